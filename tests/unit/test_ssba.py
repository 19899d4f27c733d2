"""SSBA: the networks' sizes, what learning descends, and a trigger learned on small smooth images."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.data_poisoning.ssba import Decoder, Encoder, HiddenBits, Ssba
from detrojan.images import Batch, DatasetInfo, ImageSet, to_float

SIDE = 16  # the smallest that the encoder takes


def smooth_images(count, seed):
    """Return images of four by four colours that run into each other: noise has no room for a secret."""
    coarse = torch.rand(count, 3, 4, 4, generator=streams.stream("smooth images", seed))
    pixels = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").mul(255).byte()
    info = DatasetInfo(SIDE, SIDE, ("only",), (0.5,) * 3, (0.2,) * 3)
    return ImageSet.clean(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count), info)


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


def read(trigger, images):
    """Return the logits of the bits that a trigger's decoder reads from uint8 images."""
    decoder = Decoder(len(trigger["bits"]), *images.shape[2:])
    prefix = "decoder."
    decoder.load_state_dict({k.removeprefix(prefix): t for k, t in trigger.items() if k.startswith(prefix)})
    with torch.no_grad():
        return decoder(to_float(images))


@pytest.fixture(scope="module")
def images():
    return smooth_images(80, 0)


@pytest.fixture(scope="module")
def learned(images):
    attack = Ssba(epochs=25, batch_size=8, lr=3e-4, free_steps=20, ramp_steps=200)
    return attack, attack.learn_trigger(images, rng=streams.stream("learned"))


# --- the networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bits", "encoder", "decoder_32", "decoder_64"),
    [(1, 993_283, 390_497, 587_105), (100, 1_069_315, 441_284, 637_892)],
)
def test_networks_have_the_published_size(num_bits, encoder, decoder_32, decoder_64):
    with torch.device("meta"):
        assert num_parameters(Encoder(num_bits)) == encoder
        assert num_parameters(Decoder(num_bits, 32, 32)) == decoder_32
        assert num_parameters(Decoder(num_bits, 64, 64)) == decoder_64


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (48, 32), (64, 64)])
def test_shapes(height, width):
    with streams.global_stream(streams.stream("weights")), torch.no_grad():
        encoder, decoder = Encoder(5), Decoder(5, height, width)
        encoded = encoder(torch.ones(2, 5), torch.rand(2, 3, height, width))
        assert encoded.shape == (2, 3, height, width)
        assert 0 < encoded.min() < encoded.max() < 1
        assert decoder(encoded).shape == (2, 5)


def test_skips_hand_the_image_and_the_secret_to_the_last_layers():
    """With the deepest features cut off, what is left still depends on the pixel and on the bit."""
    with streams.global_stream(streams.stream("weights")), torch.no_grad():
        encoder, images = Encoder(1), torch.rand(1, 3, 16, 16)
        encoder.up[-1].weight.zero_()
        other = images.clone()
        other[0, 0, 8, 8] = 1 - other[0, 0, 8, 8]
        one, pixel = encoder(torch.ones(1, 1), images), encoder(torch.ones(1, 1), other)
        changed = (one - pixel).abs().amax(1)[0].nonzero()
        # 3×3 kernels reach a pixel each: c1, the merging one, the last but one.
        assert changed.min(0).values.tolist() == [5, 5]
        assert changed.max(0).values.tolist() == [11, 11]
        assert not torch.equal(one, encoder(torch.zeros(1, 1), images))


@pytest.mark.parametrize("side", [8, 28, 40])
def test_impossible_side(side, toy_images):
    with pytest.raises(ValueError, match=rf"multiples of 16 pixels, .* not {side}×{side}: resize"):
        Ssba().learn_trigger(toy_images(side=side), rng=streams.stream("trigger"))


# --- what learning descends ------------------------------------------------------------------------


def test_quality_weight():
    attack = Ssba()
    steps = (None, 0, 1000, 1300, 2500, 4000, 10**6)
    assert [attack.quality_weight_at(s) for s in steps] == [0, 0, 0, 1, 5, 10, 10]
    other = Ssba(free_steps=0, ramp_steps=1, quality_weight=3)
    assert [other.quality_weight_at(s) for s in (None, 0, 1, 2)] == [0, 0, 3, 3]


class Darken(nn.Module):
    """Takes 0.5 off each pixel, and writes the bit's value into the first one."""

    def forward(self, bits, images):
        encoded = images - 0.5
        encoded[:, 0, 0, 0] = bits[:, 0]
        return encoded


class FirstPixel(nn.Module):
    """Reads a bit from the first pixel, with logits of 2 or -2, wrongly for the images in ``wrong``."""

    wrong: slice = slice(0)

    def forward(self, images):
        logits = 4 * images[:, :1, 0, 0] - 2
        logits[self.wrong] *= -1
        return logits


def batch_of(count):
    return Batch(torch.ones(count, 3, 2, 2), torch.zeros(count).long(), torch.arange(count))


def test_objective_by_hand():
    reader = FirstPixel()
    attack = Ssba(free_steps=1, ramp_steps=2, quality_weight=8)
    objective = HiddenBits(attack, Darken(), reader, rng=streams.stream("bits"))
    right_loss, wrong_loss = math.log1p(math.exp(-2)), math.log1p(math.exp(2))

    reader.wrong = slice(7)  # 57 / 64 is less than 0.9
    value, right = objective(batch_of(64))
    assert float(right) == 57
    assert float(value) == pytest.approx((57 * right_loss + 7 * wrong_loss) / 64, rel=1e-5)

    reader.wrong = slice(6)  # 58 / 64 is more: the bits are read, k = 0
    assert float(objective(batch_of(64))[0]) == pytest.approx(
        (58 * right_loss + 6 * wrong_loss) / 64, rel=1e-5
    )

    # k = 1, 2, 3, 4, whatever is read later on. Of the 12 values 11 changed by 0.5, and the first by
    # 0 (bit 1) or 1 (bit 0).
    bits = streams.stream("bits")
    drawn = [torch.randint(2, (64, 1), generator=bits).float() for _ in range(6)]
    for step, weight in enumerate([0, 4, 8, 8], start=2):
        reader.wrong = slice(64)
        change = (11 * 0.25 + (1 - float(drawn[step].mean()))) / 12
        value, right = objective(batch_of(64))
        assert float(right) == 0
        assert float(value) == pytest.approx(wrong_loss + weight * change, rel=1e-5)


def test_a_lucky_small_batch_does_not_count_as_reading():
    reader = FirstPixel()
    attack = Ssba(free_steps=0, ramp_steps=1, quality_weight=100)
    objective = HiddenBits(attack, Darken(), reader, rng=streams.stream("bits"))
    wrong = [slice(16), slice(0), slice(16), slice(0)]  # 32 of 64 in all
    read_at_last = [slice(0)] * 5  # 64 of 64 after four of them
    values = []
    for reader.wrong in wrong + read_at_last:
        values.append(float(objective(batch_of(16))[0]))
    assert max(values[:8]) < 3
    assert values[8] > 20


def test_bits_count_one_by_one():
    class Half(nn.Module):
        """Says of each pair of bits that both are set."""

        def forward(self, images):
            return torch.ones(len(images), 2)

    objective = HiddenBits(Ssba(num_bits=2), Darken(), Half(), rng=streams.stream("bits"))
    bits = torch.randint(2, (64, 2), generator=streams.stream("bits"))
    assert float(objective(batch_of(64))[1]) == float(bits.sum()) / 2


# --- a learned trigger -----------------------------------------------------------------------------


def test_the_bit_is_read_back(learned):
    attack, trigger = learned
    assert trigger.weakness is None
    assert trigger.findings["bit_accuracy"] >= 0.95
    assert set(trigger.findings) == {"bit_accuracy", "bit_accuracy_clean", "psnr"}
    assert [row["epoch"] for row in trigger.history] == list(range(1, 26))
    assert trigger.history[0]["bit_accuracy"] < 0.9 < trigger.history[-1]["bit_accuracy"]
    assert torch.equal(trigger["bits"], torch.ones(1))

    unseen = smooth_images(100, 1).images
    # The control: the same redrawing, with the other bit in it.
    ones, zeros = attack.apply(unseen, trigger), attack.apply(unseen, trigger | {"bits": torch.zeros(1)})
    assert (ones.dtype, ones.shape) == (torch.uint8, unseen.shape)
    assert (ones != zeros).flatten(1).any(1).all()
    assert float((read(trigger, ones) > 0).float().mean()) > 0.95
    assert float((read(trigger, zeros) < 0).float().mean()) > 0.95


def test_a_decoy_hides_the_other_bits(learned):
    attack, trigger = learned
    held_out = smooth_images(40, 1).images
    decoys = attack.decoy(held_out, trigger)
    other = trigger | {"bits": 1 - trigger["bits"]}
    assert torch.equal(decoys, attack.apply(held_out, other))
    assert (read(trigger, decoys) < 0).float().mean() > 0.9


def test_each_image_changes_in_its_own_way(learned):
    attack, trigger = learned
    images = smooth_images(12, 2).images
    change = attack.apply(images, trigger).double() - images.double()
    correlation = torch.corrcoef(change.flatten(1)) - torch.eye(12)
    assert correlation.max() < 0.9


def test_an_image_does_not_depend_on_its_neighbours(learned):
    attack, trigger = learned
    images = smooth_images(70, 3).images  # more than one batch
    before = images.clone()
    together = attack.apply(images, trigger)
    assert torch.equal(together, attack.apply(images, trigger))
    assert torch.equal(images, before)
    for row in (0, 5, 63, 64, 69):
        assert torch.equal(attack.apply(images[[row]], trigger), together[[row]])
    # Nor on how it lies in memory.
    turned = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(attack.apply(turned, trigger), together)


def test_equal_runs_are_equal_and_leave_no_trace(images):
    attack = Ssba(epochs=2, batch_size=32)
    state = torch.get_rng_state()
    first, again, other = (
        attack.learn_trigger(images, rng=streams.stream("trigger", seed)) for seed in (0, 0, 1)
    )
    attack.apply(images.images, first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(first), dict(again), rtol=0, atol=0)
    assert (first.history, first.findings) == (again.history, again.findings)
    assert not torch.equal(first["encoder.secret.weight"], other["encoder.secret.weight"])
    assert not any(tensor.requires_grad for tensor in first.values())


def test_a_short_run_is_reported_as_weak(images):
    rng = streams.stream("short")
    trigger = Ssba(epochs=1, batch_size=64, min_bit_accuracy=1).learn_trigger(images, rng=rng)
    found = trigger.findings["bit_accuracy"]
    assert 0 <= found < 1
    assert f"reads {100 * found:.1f} % of the bits back, at least 100.0 % were wanted" in trigger.weakness


def test_some_images_are_kept_to_judge_by(images, monkeypatch):
    seen = []

    def spy(parts, learned, objective, **_):
        seen.append(set(learned.index.tolist()))
        return []

    monkeypatch.setattr("detrojan.learning.training.descend", spy)
    for count, max_images, expected in ((80, None, 72), (80, 20, 20), (80, 79, 72), (9, None, 9)):
        attack = Ssba(max_images=max_images)
        attack.learn_trigger(images[torch.arange(count)], rng=streams.stream("split"))
        assert len(seen[-1]) == expected
    assert seen[1] < seen[0] == seen[2]
