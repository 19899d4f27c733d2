"""FST: Feature Shift Tuning, start the classifier anew and keep it from turning back.

Source: Min, Qin, Shen, Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning",
NeurIPS 2023 (arXiv 2310.01875): plain fine-tuning leaves clean and backdoor features entangled, so the
linear classifier is drawn anew and pushed away from the old one, and the features have to shift.
Epochs, rate and alpha of each data set are those configured in the survey's benchmark
(arXiv 2411.11200), which follow the paper: less alpha for more classes. Its runs took the option's
defaults instead (15 epochs, 0.01, 0.2 everywhere). Where a head has several linear layers, all are drawn
anew, as there; the paper's networks have one, and on VGG three random layers of 120 million weights are
a lot to ask of a few images.

With few images there are few steps, and a new classifier may not recover: CIFAR-10 at 10 images a
class has one step an epoch. The protocol ``paper`` takes at least the steps of the authors' command on 2 %
of CIFAR-10, 10 epochs of 8 steps of 128 images, has their rate for every data set, and draws the last
layer alone, as their code does. It keeps less alpha for more classes, which their README advises.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, num_batches, passes, to_device
from detrojan.learning import training
from detrojan.models import Classifier
from detrojan.models._parts import places
from detrojan.settings import Optimization


class FST(Defense):
    """Draw the classifier anew, then train all weights while it is pushed away from what it was."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1}

    layers: list[str] = Field(
        [], description="linear modules of the network that are drawn anew; none: those of its head"
    )
    alpha: float = Field(
        0.2, ge=0, description="weight of the inner product of each new layer's weights with the old ones"
    )
    head_only: bool = Field(False, description="draw the last of these layers anew, and leave the others")
    epochs: int = Field(10, ge=1, description="passes over the images")
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(0.01, gt=0, description="learning rate of the first epoch, cosine to zero")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov; there is no weight decay")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` whose new layers have the norms of the old; it trains on every image.

        Raises:
            NotApplicableError: a layer is missing or isn't linear, or the network ends in none.
        """
        repaired = copy.deepcopy(model)
        assert isinstance(repaired, Classifier)
        layers = self.layers or places.head(repaired.network, clean.train.images).layers
        layers = layers[-1:] if self.head_only else layers
        fresh = NewLayers(repaired, layers)
        clean.chosen["layers"] = layers
        fresh.draw(streams.child(rng, "layers"))

        def shifting(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            value, logits = training.cross_entropy(network, batch)
            return value + self.alpha * fresh.alignment(), logits

        images = clean.everything
        optimization = Optimization(
            epochs=passes(self.epochs, self.min_steps, num_batches(len(images), self.batch_size)),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,
        )
        training.fit(
            repaired,
            images,
            optimization,
            rng=streams.child(rng, "tune"),
            augmentation=images.info.augmentation,
            loss=shifting,
            after_step=fresh.project,
        )
        return repaired


class NewLayers:
    """The linear layers of a network that are drawn anew, and the weights that they had before.

    Attributes:
        layers: the modules.
        originals: the weight each had, (out, in).
        norms: the Frobenius norm of each, scalar tensors.

    Raises:
        NotApplicableError: the network has no module of such a name, or it isn't linear.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        network = getattr(model, "network", model)
        modules = dict(network.named_modules())
        self.layers: list[nn.Linear] = []
        for name in names:
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear):
                found = "there is none" if layer is None else f"it is {type(layer).__name__}"
                linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
                raise NotApplicableError(
                    f"FST draws the linear layer {name!r} anew, but {found}: set FST's 'layers' to some of "
                    f"{', '.join(linear) or 'none, this network has no linear layer'}"
                )
            self.layers.append(layer)
        self.originals = [layer.weight.detach().clone() for layer in self.layers]
        self.norms = [torch.linalg.vector_norm(weight) for weight in self.originals]

    @torch.no_grad()
    def draw(self, rng: torch.Generator) -> None:
        """Draw weights and biases uniform in ±1/sqrt(inputs); the norms are not yet those of the old."""
        for layer in self.layers:
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng)
                parameter.copy_(to_device(drawn, parameter.device))

    def alignment(self) -> Tensor:
        """Return the sum over the layers of the inner product of new and old weights, a scalar."""
        pairs = zip(self.layers, self.originals, strict=True)
        return torch.stack([(layer.weight * original).sum() for layer, original in pairs]).sum()

    @torch.no_grad()
    def project(self) -> None:
        """Scale each layer's weights back to the norm that they had; biases are free."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            layer.weight.mul_(norm / torch.linalg.vector_norm(layer.weight))
