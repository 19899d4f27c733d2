"""Makes the catalogue of networks of others anew: ``python benchmarks/catalogue.py``; needs timm.

Study files are checked with it before the first job. It builds each network without memory, tries it on
images of some sides, and asks its library for the mean and std of its published weights. Nothing is
downloaded. ``--only NAME`` prints what it finds of one, in the catalogue or not.
"""

import argparse
from typing import Any

import torch
import yaml

from detrojan import registry
from detrojan.models._parts import facts
from detrojan.models._parts.named import NamedNetwork
from detrojan.models._parts.torchvision import torchvision

NUM_CLASSES = 10
HEAD = """\
# What study files may know of networks of others before the first job; written by benchmarks/catalogue.py.
# `classes` are those that `parameters` were counted with; a network with `fixed_side` takes no other.
"""
TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d"),
    *("vgg11_bn", "vgg16", "vgg16_bn", "vgg19", "densenet121", "densenet169"),
    *("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf"),
    *("efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "convnext_small", "convnext_base"),
    *("swin_t", "swin_s", "vit_b_16", "vit_b_32", "vit_l_16"),
)
TIMM = (
    *(
        "resnet18",
        "resnet50",
        "convnext_tiny",
        "convnext_atto",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
    ),
    *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224"),
    *("deit_small_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224"),
)


def entry(name: str) -> dict[str, Any]:
    """Return what the catalogue says of a network."""
    network = facts.on_meta(lambda: NamedNetwork(network=name).build(NUM_CLASSES))
    found = facts.entry(network, NUM_CLASSES)
    mean, std = normalization(name)
    return found | {"mean": list(mean), "std": list(std)}


def normalization(name: str) -> tuple[Any, Any]:
    """Return mean and std that the library's published weights of a network want."""
    source, _, short = name.partition(":")
    if source == "torchvision":
        transform = torchvision.models.get_model_weights(short).DEFAULT.transforms()
        return transform.mean, transform.std
    import timm

    published = timm.get_pretrained_cfg(short)
    return published.mean, published.std


def main() -> None:
    """Write the catalogue."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="print what is found of one network")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only:
        print(yaml.safe_dump({only: entry(only)}, sort_keys=False, default_flow_style=None))
        return
    names = [*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM)]
    text = yaml.safe_dump(
        {name: entry(name) for name in names}, sort_keys=False, default_flow_style=None, width=110
    )
    registry.CATALOGUE.write_text(HEAD + text, encoding="utf-8")


if __name__ == "__main__":
    main()
