"""Detrojan measures how well backdoor mitigation repairs image classifiers."""

__version__ = "0.1.0"
