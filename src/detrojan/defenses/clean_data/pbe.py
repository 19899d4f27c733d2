"""PBE: fine-tune by turns on adversarial examples with their right labels and on clean images.

Source: Mu, Niu, Wang, Wang, Miao, Jin, Hua, "Progressive Backdoor Erasing via Connecting Backdoor and
Adversarial Attacks", CVPR 2023 (arXiv 2202.06312): untargeted adversarial examples of a backdoored
model drift to the target class and excite the neurons that the trigger excites. The whole method also
picks clean images out of the poisoned training set. A defender who holds clean images does without
that, which its authors call adversarial fine-tuning. So does the survey's benchmark
(arXiv 2411.11200), whose settings these are; as there, each pass over the images has an optimizer of
its own, which starts without momentum.
Departures from that benchmark, each a slip there. Images are attacked as pixels in [0, 1] (there
normalized images are clipped to [0, 1], which on CIFAR-10 and Tiny-ImageNet moves them far beyond
eps). They are attacked in eval mode (there mostly in training mode, so that the running statistics
follow each step of the attack). And adversarial passes have momentum as clean ones do (there they make
a new optimizer for each batch, which matters where a pass has more than one).
"""

import copy
import dataclasses
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.adversarial import ascend
from detrojan.defenses.base import Defense
from detrojan.images import Batch, DefenderSample, num_batches, passes, to_device
from detrojan.learning import training
from detrojan.settings import Optimization


class PBE(Defense):
    """Adversarial fine-tuning, the core of Progressive Backdoor Erasing."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1, "steps": 1}

    epochs: int = Field(20, ge=1, description="passes over the images attacked, and as many over them clean")
    min_steps: int = Field(
        0,
        ge=0,
        description="fewest optimizer steps of both kinds; passes are added until they are taken; 0: none",
    )
    eps: float = Field(
        0.02, ge=0, le=1, description="bound of a perturbation, of pixels in [0, 1]; 0 leaves fine-tuning"
    )
    step: float = Field(0.2, gt=0, description="size of a step of the attack, share of eps")
    steps: int = Field(7, ge=1, description="steps of the attack")
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(0.01, gt=0, description="learning rate, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov, reset before each pass")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a fine-tuned copy of ``model``; it chooses nothing, so it trains on every image."""
        repaired = copy.deepcopy(model)
        images = clean.everything
        starts = streams.child(rng, "starts")

        # Here and not while the batch is prepared: passes in the loss are quick on a GPU (bfloat16).
        def adversarial(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            attacked = self.attack(network.eval(), batch, rng=starts)
            network.train()
            return training.cross_entropy(network, dataclasses.replace(batch, images=attacked))

        one_pass = Optimization(
            epochs=1,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="constant",
        )
        # Each turn goes over the images twice.
        turns = passes(self.epochs, self.min_steps, 2 * num_batches(len(images), self.batch_size))
        for epoch in range(turns):
            for name, loss in (("adversarial", adversarial), ("clean", training.cross_entropy)):
                training.fit(
                    repaired,
                    images,
                    one_pass,
                    rng=streams.child(rng, name, epoch),
                    augmentation=images.info.augmentation,
                    loss=loss,
                )
        return repaired

    def attack(self, model: nn.Module, batch: Batch, *, rng: torch.Generator) -> Tensor:
        """Return adversarial copies of a batch's images, float32 (B, 3, H, W), by PGD on the cross-entropy.

        They lie in [0, 1] and within ``eps`` of the images. The mode of ``model`` is the caller's.

        Args:
            model: to be fooled.
            batch: images and their labels.
            rng: draws where in the allowed box the search starts.
        """
        images = batch.images
        lowest, highest = (-images).clamp(min=-self.eps), (1 - images).clamp(max=self.eps)
        uniform = torch.rand(images.shape, generator=rng).mul_(2).sub_(1)
        start = to_device(uniform, images.device) * self.eps
        perturbation = ascend(
            lambda moving: F.cross_entropy(model(images + moving), batch.labels),
            start.clamp(lowest, highest),
            steps=self.steps,
            step=self.step * self.eps,
            project=lambda moved: moved.clamp(lowest, highest),
        )
        return images + perturbation
