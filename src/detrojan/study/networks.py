"""Networks of others in a study file: their short form, and what can be known of them before the first job.

Free of torch, as all that the Snakefile reads at every parse.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detrojan import registry
from detrojan.registry import NETWORK, NETWORK_SOURCES

NAME = "[a-z0-9_]+"  # of an architecture: it is part of paths
# What a factory takes but a study may not hand to it: by these it would download, read files, or have
# other logits than the data set has classes.
REFUSED_OPTIONS = (
    *("pretrained", "weights", "weights_backbone", "checkpoint_path", "cache_dir", "num_classes"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "features_only"),
)
FIELDS = registry.declared("models", "torchvision:").settings  # of all networks of others
SIZES = ("img_size", "image_size")  # options that say for which side a network is made


def expanded(raw: Any) -> Any:
    """Return a parsed study file with the short form of networks written out, all else as it is.

    ``torchvision:resnet50`` among ``grid.architectures`` stands for an architecture ``resnet50`` with that
    ``network``. Where the name is taken by something else it stays, and is refused as unknown.
    """
    if not isinstance(raw, Mapping):
        return raw
    grid = raw.get("grid")
    named = grid.get("architectures") if isinstance(grid, Mapping) else None
    if not isinstance(named, list) or not any(map(_is_short, named)):
        return dict(raw)
    section = raw.get("architectures")
    own = dict(section) if isinstance(section, Mapping) else {}
    names = []
    for name in named:
        if _is_short(name) and short_name(name) not in registry.names("models"):
            entry = own.setdefault(short_name(name), {NETWORK: name})
            # Not found among the names, it is told what is wrong.
            same = isinstance(entry, Mapping) and entry.get(NETWORK) == name
            names.append(short_name(name) if same else name)
        else:
            names.append(name)
    assert isinstance(grid, Mapping)
    return {**raw, "grid": {**grid, "architectures": names}, "architectures": own}


def _is_short(name: Any) -> bool:
    return isinstance(name, str) and registry.is_network(name)


def short_name(network: str) -> str:
    """Return the name that the short form gives to an architecture: of a file its own, else the last part."""
    last = Path(network).stem if network.endswith(".py") else network.rpartition(":")[2]
    return re.sub("[^a-z0-9_]", "_", last.lower())


def of(raw: Any) -> dict[str, str]:
    """Return the networks of others that the section ``architectures`` of a parsed study names, by entry."""
    section = raw.get("architectures") if isinstance(raw, Mapping) else None
    entries = section.items() if isinstance(section, Mapping) else ()
    return {
        name: entry[NETWORK]
        for name, entry in entries
        if isinstance(name, str) and isinstance(entry, Mapping) and isinstance(entry.get(NETWORK), str)
    }


def wrong(raw: Any) -> Iterator[str]:
    """Say what is wrong with the networks of others that a parsed study names, a line each."""
    for name, network in of(raw).items():
        path = f"architectures.{name}"
        if not re.fullmatch(NAME, name):
            yield f"{path}: the name becomes part of paths: use small letters, digits and _ only"
        if name in registry.names("models"):
            yield f"{path}.{NETWORK}: {name} is an architecture of {name}.py: take another name"
        mistake = _wrong_network(network)
        if mistake:
            yield f"{path}.{NETWORK}: {mistake}"
            continue
        entry = raw["architectures"][name]
        yield from _wrong_entry(path, entry)


def _wrong_network(network: str) -> str | None:
    """Return what is wrong with the name of a network; None if it may be one."""
    if network.endswith(".py"):
        try:
            registry.own_network(network)
        except ValueError as error:
            return str(error)
        return None
    source, _, name = network.partition(":")
    if source not in NETWORK_SOURCES or not re.fullmatch("[a-z0-9_.]+", name):
        return (
            f"{network!r} is no network: write torchvision:NAME, timm:NAME (small letters, digits, _ and . "
            "only: nothing is read from a hub or a folder), or the path of a Python file"
        )
    if source == "timm" and importlib.util.find_spec("timm") is None:
        return registry.NO_TIMM
    return None


def _wrong_entry(path: str, entry: Mapping[str, Any]) -> Iterator[str]:
    options = entry.get("options")
    if isinstance(options, Mapping):
        if entry[NETWORK].endswith(".py"):
            known = registry.own_network(entry[NETWORK]).settings.model_fields
            unknown = [key for key in options if key not in known]
            allowed = f"the file's class has {', '.join(known) or 'none'}"
        else:
            unknown = [key for key in options if key in REFUSED_OPTIONS]
            allowed = "weights come from `pretrained`, classes from the data set"
        for key in unknown:
            yield f"{path}.options.{key}: no option that can be set: {allowed}"
    if (entry.get("mean") is None) != (entry.get("std") is None):
        yield f"{path}: give both mean and std, or neither to have the data set's"
    for number in entry.get("std") or () if isinstance(entry.get("std"), list) else ():
        if isinstance(number, int | float) and number <= 0:
            yield f"{path}.std: should be greater than 0, found {number}"
    weights = entry.get("pretrained")
    if isinstance(weights, str) and not (weights.endswith(".safetensors") and Path(weights).is_file()):
        yield f"{path}.pretrained: no safetensors file {weights!r}: weights are never downloaded, bring it"


def wrong_side(name: str, settings: Mapping[str, Any], image_size: int) -> str | None:
    """Return what is wrong with the side of the images that an architecture gets; None if nothing is known.

    Args:
        name: of the architecture, or of the network of others that it is.
        settings: of it, as :meth:`detrojan.study.schema.Study.method` returns them.
        image_size: of the data set, pixels.
    """
    facts = registry.declared("models", name).constants
    side = settings.get("resize") or image_size
    options = settings.get("options") or {}
    fixed = next((options[key] for key in SIZES if key in options), facts.get("fixed_side"))
    if fixed is not None and side != fixed:
        return (
            f"{name} takes {fixed} pixels and no other size: set resize: {fixed}, or the size in its options "
            "(img_size, patch_size) if it has such"
        )
    if side < facts["min_side"] and fixed is None:
        enlarge = " or resize" if registry.is_network(name) else ""
        return f"{name} takes {facts['min_side']} or more: raise it{enlarge}, or leave the architecture out"
    return None


def unknown(network: str) -> bool:
    """Return whether nothing is known of a network before its first job."""
    return ":" in network and network not in registry.catalogue()
