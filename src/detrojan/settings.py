"""Settings that study files hold and stages use: augmentation, training, the attack gate.

Free of torch, because the Snakefile checks them while it is parsed.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Augmentation(BaseModel):
    """How training images are varied, each on its own: zero padding and a random crop, then a flip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_padding: int = Field(4, ge=0, le=511, description="black border before the random crop, pixels")
    flip: bool = Field(False, description="mirror left to right with probability 1/2")


LATER = ("optimizer", "betas", "warmup", "clip", "decay_norms")  # settings of training that came later
NO_AUGMENTATION = Augmentation(crop_padding=0, flip=False)


class Optimization(BaseModel):
    """SGD with momentum, or AdamW; the learning rate is set once an epoch.

    The defaults are the survey's (arXiv 2411.11200; its benchmark's configuration for all data sets
    and architectures). Its cosine runs over 100 epochs however many there are; here the period is
    ``epochs``, so a shortened run still ends near zero. What else transformers want is off by default, and
    stands among the settings of a run only where it is on: it came later, and reruns nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(100, ge=1, description="passes over the images")
    batch_size: int = Field(128, ge=2, description="images a step")
    lr: float = Field(
        0.01, gt=0, description="learning rate of the first epoch, behind warmup if there is one"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters, normalization included")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate")
    bfloat16: bool = Field(
        True, description="compute passes in bfloat16 where there is a GPU; weights stay in float32"
    )

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="what the weights follow")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW: decay of its two moments")
    warmup: int = Field(
        0,
        ge=0,
        description="epochs over which the learning rate rises in equal steps, before the schedule",
    )
    clip: float | None = Field(
        None, gt=0, description="largest L2 norm of a step's gradient, of all weights together; none: any"
    )
    decay_norms: bool = Field(
        True, description="whether weight decay acts on vectors, class tokens and position embeddings too"
    )

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``, the first being 0."""
        if epoch < self.warmup:
            return self.lr * (epoch + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr / 2 * (1 + math.cos(math.pi * (epoch - self.warmup) / (self.epochs - self.warmup)))

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = usual(self)
        off = {name for name in LATER if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in values.items() if name not in off}


class Gate(BaseModel):
    """When an attack counts as having worked; a defense of a model whose attack did not shows nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_asr: float = Field(0.8, ge=0, le=1, description="smallest ASR of the untouched model")
    max_acc_loss: float = Field(
        0.1, ge=0, le=1, description="largest loss of ACC against the clean model of the same seed"
    )
    min_asr_gain: float = Field(
        0.5, ge=-1, le=1, description="smallest ASR beyond the clean model's on the same images; -1: any"
    )
