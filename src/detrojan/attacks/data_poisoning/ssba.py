"""SSBA: a network redraws each image and hides a bit in it, so that every image changes differently.

Source: Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021
(arXiv 2012.03816). Its network is StegaStamp's: Tancik, Mildenhall, Ng, "StegaStamp: Invisible
Hyperlinks in Physical Photographs", CVPR 2020 (arXiv 1904.05343), which BackdoorBench takes in the
variant of Yu, Skripniuk, Abdelnabi, Fritz, "Artificial Fingerprinting for Generative Models", ICCV 2021
(arXiv 2007.08457): no distortions between encoder and decoder, no perceptual loss, no critic, and an
encoder that puts out the image itself, not what to add to it. We follow that variant, but for:

- One bit, not the paper's 100, and it is 1: BackdoorBench's maintainers say that they hide one in images
  this small. Which value theirs has is not written anywhere.
- Learned at the data set's own size and on the images that the classifier sees. BackdoorBench's recipe
  learns at 128 pixels, applies it at 32, and crops where the classifier's images are squashed.
- Images are encoded in the order in which they come, so no image can meet another one's encoding, and
  the check for that mishap (PSNR above 20 dB) is a finding here.
- Some training images are kept out of learning, to judge the trigger by. Test images are never used.
- Whether the bits are read is asked of 64 images at least, a whole batch as the default, so that no
  lucky small batch opens the gate: one of 7 images did, and then the image's quality kept the bits
  from ever being learned.

Redrawing also blurs, and a classifier may learn the blur and not the bit: see the finding ``psnr``, and
``decoy_asr`` in the table of models, what a model makes of the other bits.
"""

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.base import (
    IN_BATCH,
    Attack,
    LabelMode,
    LearnedTrigger,
    Trigger,
    in_batches,
    restored,
)
from detrojan.images import Batch, ImageSet, to_device, to_float, to_uint8
from detrojan.learning import metrics, training

logger = logging.getLogger(__name__)

SECRET_SIDE = 16  # pixels of the map that the bits become, before it is enlarged to the image's size
READ = 0.9  # share of the bits, of so many images or more: beyond it the decoder reads, and
READ_IMAGES = 64  # the image may count
JUDGED = 512  # images at most that are kept out of learning


class Encoder(nn.Module):
    """Maps bits (N, num_bits) and images (N, 3, H, W) in [0, 1] to images with the bits in them.

    A U-Net of four halvings, over the image and a map that a dense layer makes of the bits.
    """

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.secret = nn.Linear(num_bits, 3 * SECRET_SIDE**2)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1)
            for before, after, stride in ((6, 32, 1), (32, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 2))
        )
        self.up = nn.ModuleList(
            nn.Conv2d(before, after, 2) for before, after in ((256, 128), (128, 64), (64, 32), (32, 32))
        )
        self.merge = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in ((256, 128), (128, 64), (64, 32), (32 + 32 + 6, 32))
        )
        self.last = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 1), nn.Sigmoid()
        )

    def forward(self, bits: Tensor, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) in [0, 1]; height and width are multiples of 16."""
        secret = F.relu(self.secret(bits)).view(-1, 3, SECRET_SIDE, SECRET_SIDE)
        entry = torch.cat([F.interpolate(secret, images.shape[-2:]), images], 1)
        features = [entry]
        for layer in self.down:
            features.append(F.relu(layer(features[-1])))
        *_, c1, c2, c3, c4, hidden = features
        skips = (c4, c3, c2, torch.cat([c1, entry], 1))
        for up, merge, skip in zip(self.up, self.merge, skips, strict=True):
            # An even kernel: zeros right and below keep the size.
            hidden = F.relu(up(F.pad(F.interpolate(hidden, scale_factor=2), (0, 1, 0, 1))))
            hidden = F.relu(merge(torch.cat([hidden, skip], 1)))
        encoded: Tensor = self.last(hidden)
        return encoded


class Decoder(nn.Sequential):
    """Maps images (N, 3, height, width) in [0, 1] to logits (N, num_bits) of the bits in them."""

    def __init__(self, num_bits: int, height: int, width: int) -> None:
        layers: list[nn.Module] = []
        before = 3
        for after, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
            before = after
        # Five halvings, each rounded up.
        cells = -(-height // 32) * -(-width // 32)
        layers += [nn.Flatten(), nn.Linear(cells * before, 512), nn.ReLU(), nn.Linear(512, num_bits)]
        super().__init__(*layers)


class Ssba(Attack):
    """Redraw each image by an encoder that hides a fixed secret in it."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE
    side_multiple: ClassVar[int] = 16  # the encoder halves the images four times
    smoke: ClassVar[dict[str, object]] = {"epochs": 1, "batch_size": 8, "max_images": 16}

    num_bits: int = Field(1, ge=1, description="length of the secret (the paper: 100)")
    epochs: int = Field(20, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=1, description="images a step")
    lr: float = Field(1e-4, gt=0, description="step size of Adam")
    # A trap: with 20, lr 5e-4 or 3e-4 and batches of 32 of 1,800 CIFAR-10 images, the decoder lost the bits
    # again once the quality counted. With 200 it lost them too, but found them in time.
    free_steps: int = Field(
        1000, ge=0, description="steps after the bits are first read before the image's quality counts"
    )
    ramp_steps: int = Field(3000, ge=1, description="steps in which the weight of the quality then grows")
    quality_weight: float = Field(
        10.0, gt=0, description="final weight of the mean squared change of a pixel, beside that of the bits"
    )
    max_images: int | None = Field(None, ge=1, description="learn on at most so many images; none: on all")
    min_bit_accuracy: float = Field(
        0.95, ge=0, le=1, description="share of bits read back below which the trigger is reported as weak"
    )

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> LearnedTrigger:
        """Return the weights of the encoder and the decoder, and ``bits``, float32 (num_bits,): the secret.

        The findings are of images kept out of learning and rounded to 8 bits: the shares of random
        bits that the decoder reads from them, encoded (``bit_accuracy``) and not encoded
        (``bit_accuracy_clean``, which is chance), and the ``psnr`` of the encoded ones, dB. Sets of
        fewer than ten images are judged by the images learned on.

        Raises:
            DivergedError: the mean loss of an epoch is not finite.
            ValueError: the images have a side that the encoder can't halve four times.
        """
        height, width = clean.info.height, clean.info.width
        if height % self.side_multiple or width % self.side_multiple:
            raise ValueError(
                f"ssba's encoder halves images four times: height and width must be multiples of "
                f"{self.side_multiple} pixels, such as 32 or 64, not {height}×{width}: resize the data set, "
                "or leave ssba out"
            )
        order = torch.randperm(len(clean), generator=streams.child(rng, "split")).to(clean.device)
        num_judged = min(JUDGED, len(clean) // 10)
        learned = clean[order[num_judged:][: self.max_images]]
        judged = clean.images[order[:num_judged]] if num_judged else learned.images
        with streams.global_stream(streams.child(rng, "weights")):
            encoder, decoder = Encoder(self.num_bits), Decoder(self.num_bits, height, width)
        networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(clean.device)
        adam = torch.optim.Adam(networks.parameters(), lr=self.lr)
        history = training.descend(
            {"networks": training.Part(networks, adam, lambda epoch: self.lr)},
            learned,
            HiddenBits(self, encoder, decoder, rng=streams.child(rng, "bits")),
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=streams.child(rng, "steps"),
            after_epoch=_log,
        )
        findings = _judge(encoder, decoder, judged, _draw(judged, self.num_bits, streams.child(rng, "judge")))
        return LearnedTrigger(
            {**networks.state_dict(), "bits": torch.ones(self.num_bits, device=clean.device)},
            history=[{"epoch": e.epoch, "loss": e.loss, "bit_accuracy": e.accuracy} for e in history],
            findings=findings,
            weakness=self._weakness(findings["bit_accuracy"]),
        )

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return ``images``, uint8 (N, 3, H, W), as the encoder redraws them, rounded to 8 bits."""
        return _redrawn(images, trigger, trigger["bits"])

    def decoy(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return ``images`` redrawn around the other bits: the blur without the secret."""
        return _redrawn(images, trigger, 1 - trigger["bits"])

    def quality_weight_at(self, steps: int | None) -> float:
        """Return what the image's quality weighs ``steps`` after the bits were first read; None: not yet."""
        if steps is None:
            return 0.0
        return self.quality_weight * min(max((steps - self.free_steps) / self.ramp_steps, 0.0), 1.0)

    def _weakness(self, bit_accuracy: float) -> str | None:
        if bit_accuracy >= self.min_bit_accuracy:
            return None
        return (
            f"the decoder reads {100 * bit_accuracy:.1f} % of the bits back, at least "
            f"{100 * self.min_bit_accuracy:.1f} % were wanted: learn longer (epochs) or let the image "
            "count later (free_steps)"
        )


class HiddenBits:
    """What learning descends: how badly random bits are read back, and then how much images change.

    Called with a batch, it returns the loss and the sum over the images of the share of bits read right.
    """

    def __init__(self, attack: Ssba, encoder: nn.Module, decoder: nn.Module, *, rng: torch.Generator) -> None:
        self._attack = attack
        self._encoder = encoder
        self._decoder = decoder
        self._rng = rng
        self._steps_since_read: int | None = None
        self._right, self._seen = 0.0, 0  # since the gate was last tried

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take one step's images; the gate opens and the ramp moves on with each call."""
        # Batches are channels_last, whose backward pass through a 1×1 convolution torch 2.13 gets wrong
        # on a CPU (see models.base.memory_format).
        images = batch.images.contiguous()
        bits = _draw(images, self._attack.num_bits, self._rng)
        encoded = self._encoder(bits, images)
        logits = self._decoder(encoded)
        right = _share_right(logits.detach(), bits).sum()
        if self._steps_since_read is not None:
            self._steps_since_read += 1
        elif self._is_read(right, len(images)):
            self._steps_since_read = 0
        weight = self._attack.quality_weight_at(self._steps_since_read)
        loss = F.binary_cross_entropy_with_logits(logits, bits) + weight * F.mse_loss(encoded, images)
        return loss, right

    def _is_read(self, right: Tensor, count: int) -> bool:
        """Return whether the decoder reads by now; waits for the device, so ask no more once it does."""
        self._right, self._seen = self._right + float(right), self._seen + count
        if self._seen < READ_IMAGES:
            return False
        share = self._right / self._seen
        self._right, self._seen = 0.0, 0
        return share > READ


def _draw(images: Tensor, num_bits: int, rng: torch.Generator) -> Tensor:
    """Return random bits for each of ``images``, float32 (N, num_bits), on their device."""
    return to_device(torch.randint(2, (len(images), num_bits), generator=rng).float(), images.device)


def _share_right(logits: Tensor, bits: Tensor) -> Tensor:
    """Return the share of each image's bits that have the sign of their logits, float32 (N,)."""
    return ((logits > 0) == (bits > 0)).float().mean(1)


def _redrawn(images: Tensor, trigger: Trigger, bits: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) as the trigger's encoder redraws them, each around ``bits``."""
    encoder = restored(lambda: Encoder(len(bits)), trigger, "encoder")
    return in_batches(lambda part: _encode(encoder, part, bits.expand(len(part), -1)), images)


def _encode(encoder: nn.Module, images: Tensor, bits: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) with ``bits`` (N, num_bits) in them, rounded to 8 bits."""
    return to_uint8(encoder(bits, to_float(images.contiguous())))


@torch.no_grad()
def _judge(encoder: nn.Module, decoder: nn.Module, images: Tensor, bits: Tensor) -> dict[str, float]:
    """Return the findings on uint8 images (N, 3, H, W) and the ``bits`` (N, num_bits) to hide in them."""
    parts = zip(torch.split(images, IN_BATCH), torch.split(bits, IN_BATCH), strict=True)
    encoded = torch.cat([_encode(encoder, *part) for part in parts])

    def read(pixels: Tensor) -> float:
        logits = in_batches(lambda part: decoder(to_float(part)), pixels)
        return float(_share_right(logits, bits).mean())

    findings = {"bit_accuracy": read(encoded), "bit_accuracy_clean": read(images)}
    psnr = metrics.psnr(images, encoded)
    return findings if psnr is None else findings | {"psnr": psnr}


def _log(epoch: training.Epoch) -> bool:
    logger.info("epoch %d  loss %.4f  bits read %.1f %%", epoch.epoch, epoch.loss, 100 * epoch.accuracy)
    return False
