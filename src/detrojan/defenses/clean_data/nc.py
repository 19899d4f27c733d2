"""NC: Neural Cleanse, find the backdoor's target by its small trigger, then fine-tune against that trigger.

Source: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE S&P 2019, pp. 707-723: detection (Sec. IV) and mitigation
by unlearning (Sec. VI); hyperparameters of the survey's benchmark (arXiv 2411.11200). The search for
triggers, and what departs there, stands in :mod:`detrojan.defenses._parts.inversion`. The paper
fine-tunes for one epoch on a tenth of the training set; the benchmark, and this, for many on the
defender's images. Where no class is flagged, the model comes back as it was.

The protocol ``paper`` searches as the authors' example for GTSRB does (bolunwang/backdoor): 31 steps of 32
images an epoch, a hit rate of 0.99, 1,000 epochs at most, which we cap at 2,000 steps. It tunes for as
many steps as their one epoch has on a tenth of CIFAR-10, 157 of 32 images. Their search starts from random
masks and patterns, with no weight on the mask until five epochs have reached the hit rate, and counts any
smaller mask as progress; here both protocols start and count as the benchmark does.

Departures from the benchmark, whose repair fails with few images: the stamped fifth is drawn at random
and in proportion to the classes (there: the last images, which are those of the last classes, and all
of them copies of one); they get the mask and pattern that were found (there: images of them whose
contrast was stretched); the model that was tuned is returned (there: a copy from before). On
Tiny-ImageNet, too, the learning rate falls along a cosine, where the benchmark waits for a plateau of
the training loss.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan import rng as streams
from detrojan.defenses._parts.inversion import TriggerInversion, Triggers
from detrojan.defenses._parts.subsets import stratified
from detrojan.defenses.base import Tuning
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, ImageSet, concatenate
from detrojan.learning import training


class NC(Tuning, TriggerInversion):
    """Flag the classes that a small trigger reaches, and unlearn those triggers."""

    # Any mask counts as a trigger, so that some classes are flagged and the model is tuned at all.
    smoke: ClassVar[dict[str, object]] = {
        "epochs": 1,
        "inversion_epochs": 2,
        "min_steps": 1,
        "max_images": 1,
        "hit_rate": 0.0,
        "anomaly_threshold": 1.0,
        "stamped_share": 0.01,
    }

    tuning_min_steps: int = Field(
        0, ge=0, description="fewest steps of the tuning; passes are added until they are taken; 0: none"
    )
    stamped_share: float = Field(
        0.2, gt=0, lt=1, description="share of the images that are replaced by stamped copies"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model``, fine-tuned if a class was flagged; it trains on every image."""
        images = clean.everything
        if images.num_classes < 3:
            raise NotApplicableError(
                f"NC looks for an outlier among the classes; {images.num_classes} classes have none"
            )
        repaired = copy.deepcopy(model).eval()
        triggers = self.invert(model, images, rng=streams.child(rng, "invert"))
        clean.chosen.update(triggers.summary(self.anomaly_threshold))
        flagged = triggers.flagged(self.anomaly_threshold)
        clean.chosen["outcome"] = "fine-tuned" if flagged else "no class flagged: model unchanged"
        if flagged:
            # At least one: without a stamped image it would be plain fine-tuning.
            count = max(1, round(self.stamped_share * len(images)))
            rows = stratified(images.labels, count, streams.child(rng, "stamped"))
            clean.chosen["num_stamped"] = count * len(flagged)
            mixed = with_stamped(images, rows, triggers, flagged)
            training.fit(
                repaired,
                mixed,
                self.in_steps(len(mixed), self.tuning_min_steps),
                rng=streams.child(rng, "tune"),
                augmentation=images.info.augmentation,
            )
        return repaired


def with_stamped(images: ImageSet, rows: Tensor, triggers: Triggers, flagged: list[int]) -> ImageSet:
    """Return ``images`` with those at ``rows`` replaced, once a flagged class, by stamped copies.

    The copies keep their true labels.
    """
    stays = torch.ones(len(images), dtype=torch.bool, device=images.device)
    stays[rows] = False
    mixed = images[stays]
    for label in flagged:
        mixed = concatenate(mixed, triggers.stamp(images[rows], label))
    return mixed
