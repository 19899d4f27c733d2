"""FT: vanilla fine-tuning on the defender's clean images.

Source: one of the two seminal baselines, usually credited to Liu, Xie, Srivastava, "Neural
Trojans", ICCD 2017 (arXiv 1710.00942); hyperparameters of the survey's benchmark (arXiv 2411.11200).
Departures: the cosine ends with the last epoch (there its period is 100 epochs, which is the same at
the default), and no mixed precision on a CPU.

No paper of its own says how long to train, so what the protocol ``paper`` adds is ours: as many steps
as the survey's upstream, BackdoorBench, takes in 100 epochs on 5 % of CIFAR-10. That program's other
settings for Tiny-ImageNet (200 epochs, a rate that waits for a plateau) are left out, as the survey did.
"""

import copy
from typing import ClassVar

import torch
from torch import nn

from detrojan.defenses.base import FineTuning
from detrojan.images import DefenderSample
from detrojan.learning import training


class FT(FineTuning):
    """Train all weights on; nothing in the clean images supports the backdoor, so it may fade."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 2}

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a fine-tuned copy of ``model``; it chooses nothing, so it trains on every image."""
        repaired = copy.deepcopy(model)
        images = clean.everything
        training.fit(
            repaired,
            images,
            self.tuning(len(images)),
            rng=rng,
            augmentation=images.info.augmentation,
        )
        return repaired
