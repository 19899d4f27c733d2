"""Classifiers: one file an architecture, each a function of classes, image size and its settings."""

from detrojan.models.base import Build, Classifier, build, restore

__all__ = ["Build", "Classifier", "build", "restore"]
