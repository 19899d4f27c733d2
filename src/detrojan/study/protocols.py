"""Protocols: the declared sets of settings that a defense runs with, see ``config/defenses/``.

``survey`` has the values of the survey's benchmark (arXiv 2411.11200), its slips mended; they count epochs.
``paper`` has those of the method's authors, and at least as many optimizer steps as their own runs took.
``ours`` is for methods that do better otherwise. Free of torch.
"""

from collections.abc import Mapping
from typing import Any

from detrojan import registry
from detrojan.study.schema import Axis, shipped


def settings(defense: str, protocol: str, facts: Mapping[str, Axis]) -> dict[str, Any]:
    """Return all settings of a defense under a protocol.

    Args:
        defense: its name.
        protocol: that it declares.
        facts: what overrides may ask for: axes of a cell, ``num_classes``, ``image_size``.
    """
    declared = registry.declared("defenses", defense).settings
    return declared(**shipped("defenses", defense, protocol).resolve(facts)).model_dump(mode="json")
