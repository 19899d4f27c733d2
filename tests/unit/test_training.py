"""The training loop: its steps, its schedule, and a killed run that goes on with the same bits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from detrojan import registry
from detrojan import rng as streams
from detrojan.errors import DivergedError
from detrojan.learning import training
from detrojan.learning.training import Checkpoint, Part
from detrojan.settings import Augmentation, Optimization

FOUR_EPOCHS = Optimization(epochs=4, batch_size=5, lr=0.1)


class Linear(nn.Module):
    """Logits (N, 2) from the first pixel's red and green: small enough to train by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -1.0], [0.25, 0.75]]))

    def forward(self, images):
        return images[:, :2, 0, 0] @ self.weight.T


class Stateful(nn.Module):
    """A network with all that a checkpoint must bring back: momentum, running statistics, dropout."""

    def __init__(self, seed):
        super().__init__()
        with streams.global_stream(streams.stream("stateful", seed)):
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.dropout = nn.Dropout(0.5)
            self.linear = nn.Linear(6, 4)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        maps = F.relu(self.norm(self.conv(images)))
        return self.linear(self.dropout(maps.mean((2, 3))))


@pytest.fixture
def images(toy_images):
    return toy_images(count=22)


@pytest.fixture
def two_class_images(toy_images):
    return toy_images(num_classes=2, count=6)


def fit(model, images, optimization=FOUR_EPOCHS, **options):
    return training.fit(model, images, optimization, rng=streams.stream("fit"), **options)


def same_bits(first, second):
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def without_seconds(history):
    return [dataclasses.replace(epoch, seconds=0) for epoch in history]


# --- steps and schedule ----------------------------------------------------------------------------


def test_two_steps_by_hand(two_class_images):
    optimization = Optimization(epochs=2, batch_size=6, lr=0.4, momentum=0.9, weight_decay=0.1)
    model = Linear()
    history = fit(model, two_class_images, optimization)

    pixels = two_class_images.images[:, :2, 0, 0].double().numpy() / 255
    one_hot = np.eye(2)[two_class_images.labels.numpy()]
    weight, velocity, losses = np.array([[0.5, -1.0], [0.25, 0.75]]), 0.0, []
    for lr in (0.4, 0.2):  # a cosine over two epochs is at its half in the second
        exponentials = np.exp(pixels @ weight.T)
        shares = exponentials / exponentials.sum(1, keepdims=True)
        losses.append(-np.log((shares * one_hot).sum(1)).mean())
        gradient = (shares - one_hot).T @ pixels / 6 + 0.1 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - lr * velocity
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-5)
    assert [epoch.loss for epoch in history] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.1, 0.05 * (1 + 0.5**0.5), 0.05, 0.05 * (1 - 0.5**0.5)]), ("constant", [0.1] * 4)],
)
def test_learning_rate(images, schedule, expected):
    optimization = FOUR_EPOCHS.model_copy(update={"schedule": schedule})
    history = fit(Stateful(0), images, optimization)
    assert [epoch.lr for epoch in history] == pytest.approx(expected, rel=1e-12)
    assert [epoch.epoch for epoch in history] == [1, 2, 3, 4]
    assert all(epoch.seconds > 0 for epoch in history)


def test_warmup_rises_in_equal_steps_and_the_schedule_follows():
    warm = Optimization(epochs=6, lr=0.4, warmup=3)
    assert [warm.lr_at(epoch) for epoch in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [warm.lr_at(epoch) for epoch in (4, 5)] == pytest.approx([0.3, 0.1])  # a cosine over three epochs
    assert Optimization(epochs=2, warmup=9, lr=1).lr_at(1) == pytest.approx(0.2)


def test_what_came_later_is_no_setting_where_it_is_off():
    # Else every model that is trained already would be trained anew.
    before = {"epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "bfloat16"}
    assert set(Optimization().model_dump(mode="json")) == before
    adamw = Optimization(optimizer="adamw", clip=1).model_dump(mode="json")
    assert set(adamw) == before | {"optimizer", "clip"}
    assert Optimization(**adamw) == Optimization(optimizer="adamw", clip=1)


def test_a_step_of_adamw_by_hand(two_class_images):
    optimization = Optimization(
        epochs=1,
        batch_size=6,
        lr=0.1,
        weight_decay=0.5,
        optimizer="adamw",
        betas=(0.8, 0.9),
        schedule="constant",
    )
    model = Linear()
    before = model.weight.detach().clone()
    batch = two_class_images
    F.cross_entropy(model(batch.images.float() / 255), batch.labels).backward()
    gradient = model.weight.grad.clone()
    model.weight.grad = None
    fit(model, two_class_images, optimization)
    # Of the first step both moments are the gradient's own, so only its sign is left.
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient.sign()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_is_clipped_to_its_norm(two_class_images):
    optimization = Optimization(epochs=1, batch_size=6, lr=1, momentum=0, weight_decay=0, clip=1e-3)
    model = Linear()
    before = model.weight.detach().clone()
    fit(model, two_class_images, optimization)
    assert float((model.weight.detach() - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_leaves_vectors_and_embeddings_alone(decay_norms):
    model = nn.Module()
    model.pos_embed, model.linear = nn.Parameter(torch.ones(1, 4, 2)), nn.Linear(2, 3)
    model.norm, model.frozen = nn.LayerNorm(2), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimization = Optimization(optimizer="adamw", weight_decay=0.1, decay_norms=decay_norms)
    groups = training.optimizer_of(model, optimization).param_groups
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    every = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == every
    assert decayed == (every if decay_norms else {id(model.linear.weight)})


def test_a_killed_run_of_adamw_goes_on_with_the_same_bits(images, tmp_path):
    optimization = Optimization(
        epochs=4, batch_size=5, lr=0.01, optimizer="adamw", warmup=2, clip=1, decay_norms=False
    )
    whole = Stateful(0)
    fit(whole, images, optimization)
    killed = Stateful(0)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    fit(killed, images, optimization, checkpoint=checkpoint, after_epoch=lambda epoch: epoch.epoch == 2)
    resumed = Stateful(1)
    fit(resumed, images, optimization, checkpoint=checkpoint)
    same_bits(resumed, whole)


@pytest.mark.parametrize("recipe", ["finetune", "scratch"])
def test_shipped_recipes_are_settings_of_training(recipe):
    path = registry.CHECKOUT / "config" / "training" / f"{recipe}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(recipe) == ["training"]
    assert Optimization(**recipe["training"]).epochs >= 100


def test_history_is_the_mean_over_images(two_class_images):
    # Steps too small to move a weight, in batches of 4 and 2.
    still = Optimization(epochs=1, batch_size=4, lr=1e-12, weight_decay=0)
    model = Linear()
    logits = model(two_class_images.images.float() / 255).detach()
    (epoch,) = fit(model, two_class_images, still)
    assert epoch.loss == pytest.approx(float(F.cross_entropy(logits, two_class_images.labels)), rel=1e-6)
    assert epoch.accuracy == float((logits.argmax(1) == two_class_images.labels).float().mean())


def test_the_loss_can_be_replaced(two_class_images):
    def pull_to_one(model, batch):
        return (model.weight - 1).square().sum() / 2, model(batch.images)

    model = Linear()
    fit(
        model,
        two_class_images,
        Optimization(epochs=1, batch_size=6, lr=0.5, weight_decay=0),
        loss=pull_to_one,
    )
    assert model.weight.tolist() == [[0.75, 0.0], [0.625, 0.875]]


def test_frozen_parameters_stay(images):
    model = Stateful(0)
    before = copy.deepcopy(model.conv.state_dict())
    model.conv.requires_grad_(False)
    fit(model, images)
    torch.testing.assert_close(model.conv.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(model.linear.weight, Stateful(0).linear.weight)


def test_model_ends_in_eval_mode(images):
    model = Stateful(0)
    assert model.training
    fit(model, images)
    assert not model.training


# --- determinism -----------------------------------------------------------------------------------


def test_equal_streams_give_equal_bits(images):
    models = [Stateful(0) for _ in range(3)]
    for model, name in zip(models, ("a", "a", "b"), strict=True):
        torch.rand(3)  # what others drew from the global stream doesn't matter
        training.fit(model, images, FOUR_EPOCHS, rng=streams.stream(name))
    same_bits(models[0], models[1])
    assert not torch.equal(models[0].linear.weight, models[2].linear.weight)


def test_global_stream_is_left_alone(images):
    before = torch.get_rng_state()
    fit(Stateful(0), images)
    assert torch.equal(torch.get_rng_state(), before)


# --- callbacks and errors --------------------------------------------------------------------------


def test_after_epoch_ends_training(images):
    seen = []

    def second(epoch):
        seen.append(epoch)
        return epoch.epoch == 2

    model = Stateful(0)
    history = fit(model, images, after_epoch=second)
    assert history == seen
    assert len(history) == 2
    assert not model.training


def test_after_step_keeps_pruned_weights_at_zero(images):
    model, steps = Stateful(0), []

    def prune():
        steps.append(float(model.conv.weight.detach()[1].abs().max()))
        with torch.no_grad():
            model.conv.weight[1] = 0

    fit(model, images, after_step=prune)
    assert len(steps) == 4 * 5  # batches of 5, 5, 5, 5 and 2
    assert min(steps) > 0  # each step moved them
    assert not model.conv.weight[1].any()
    assert model.conv.weight[0].any()


def test_loss_that_is_not_finite(images, tmp_path):
    def broken_in_epoch_two(model, batch):
        losses.append(training.cross_entropy(model, batch)[0] * (float("nan") if len(losses) >= 5 else 1))
        return losses[-1], model(batch.images)

    losses = []
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    with pytest.raises(DivergedError, match=r"loss of epoch 2 is nan: .*learning rate \(0\.0854\)"):
        fit(Stateful(0), images, loss=broken_in_epoch_two, checkpoint=checkpoint)
    # The last finite epoch is kept, not the broken one.
    model = Stateful(1)
    part = Part(model, torch.optim.SGD(model.parameters(), lr=1), lambda epoch: 1)
    assert len(checkpoint.load({"model": part})) == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_learning_rate_that_is_too_high(two_class_images):
    with pytest.raises(DivergedError, match="lower the learning rate"):
        fit(Linear(), two_class_images, Optimization(epochs=50, batch_size=2, lr=1e30, schedule="constant"))


def test_no_images(images):
    with pytest.raises(ValueError, match="no images"):
        fit(Stateful(0), images[torch.tensor([], dtype=torch.int64)])


# --- what an attack that controls training does to the loop ----------------------------------------


def shift_labels(batch, rng):
    return dataclasses.replace(batch, labels=(batch.labels + 1) % 4, num_poisoned=2)


def test_prepared_labels_are_those_to_learn(images):
    still = Optimization(epochs=2, batch_size=22, lr=1e-12, weight_decay=0)
    model = Stateful(0)
    model.dropout.p = 0
    history = fit(model, images, still, prepare=shift_labels)
    model.train()
    predicted = model(images.images.float() / 255).argmax(1)
    right = (predicted == (images.labels + 1) % 4).float().mean()
    assert [epoch.accuracy for epoch in history] == pytest.approx([float(right)] * 2)
    assert [epoch.num_poisoned for epoch in history] == [2, 2]
    assert [epoch.num_poisoned for epoch in fit(Stateful(0), images, still)] == [0, 0]


def test_prepare_draws_from_a_stream_of_its_own(images):
    seen = []

    def look(batch, rng):
        seen.append((batch.rows.tolist(), torch.rand(2, generator=rng).tolist()))
        return batch

    same_bits(*(fitted(images, **options) for options in ({}, {"prepare": look})))
    assert sorted(row for rows, _ in seen[:5] for row in rows) == list(range(22))
    assert len({tuple(draws) for _, draws in seen}) == len(seen)


def fitted(images, **options):
    model = Stateful(0)
    fit(model, images, **options)
    return model


class Companion(nn.Module):
    """Something that learns beside the classifier, with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images)


def with_companion(images, checkpoint=None, epochs=4, after_epoch=None):
    """Train a classifier and its companion, each with an optimizer of its own; return both."""
    model, companion = Stateful(0), Companion()
    adam = torch.optim.Adam(companion.parameters(), lr=1)

    def prepare(batch, rng):
        noise = torch.rand(batch.images.shape, generator=rng)
        changed = companion(batch.images + noise)
        return dataclasses.replace(batch, images=changed, penalty=companion.norm.weight.square().sum())

    fit(
        model,
        images,
        FOUR_EPOCHS.model_copy(update={"epochs": epochs}),
        prepare=prepare,
        beside={"companion": Part(companion, adam, lambda epoch: 0.01 / (epoch + 1))},
        checkpoint=checkpoint,
        after_epoch=after_epoch,
    )
    return model, companion


def test_a_companion_learns_from_loss_and_penalty(images):
    model, companion = with_companion(images)
    assert not torch.equal(companion.norm.weight, Companion().norm.weight)
    assert not model.training
    assert not companion.training


def test_a_killed_run_with_a_companion_resumes_with_the_same_bits(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    with pytest.raises(KilledError):
        with_companion(images, checkpoint, after_epoch=kill_after(2))
    for resumed, undisturbed in zip(with_companion(images, checkpoint), with_companion(images), strict=True):
        same_bits(resumed, undisturbed)


def test_penalty_is_part_of_the_loss(two_class_images):
    still = Optimization(epochs=1, batch_size=6, lr=1e-12, weight_decay=0)

    def punish(batch, rng):
        return dataclasses.replace(batch, penalty=torch.tensor(3.0))

    (plain,) = fit(Linear(), two_class_images, still)
    (punished,) = fit(Linear(), two_class_images, still, prepare=punish)
    assert punished.loss == pytest.approx(plain.loss + 3, rel=1e-6)


# --- checkpoints -----------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a signal that ends the job."""


def kill_after(epochs):
    def after_epoch(epoch):
        if epoch.epoch == epochs:
            raise KilledError

    return after_epoch


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_killed_run_goes_on_with_the_same_bits(images, tmp_path, epochs, momentum):
    optimization = FOUR_EPOCHS.model_copy(update={"momentum": momentum})
    augmentation = Augmentation(crop_padding=2, flip=True)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    whole = Stateful(0)
    whole_history = fit(whole, images, optimization, augmentation=augmentation)

    with pytest.raises(KilledError):
        fit(
            Stateful(0),
            images,
            optimization,
            augmentation=augmentation,
            after_epoch=kill_after(epochs),
            checkpoint=checkpoint,
        )
    ran = []
    resumed = Stateful(1)  # other weights: all must come from the checkpoint
    resumed_history = fit(
        resumed,
        images,
        optimization,
        augmentation=augmentation,
        after_epoch=lambda epoch: ran.append(epoch.epoch),
        checkpoint=checkpoint,
    )
    assert ran == list(range(epochs + 1, 5))
    assert without_seconds(resumed_history) == without_seconds(whole_history)
    same_bits(resumed, whole)
    assert resumed.norm.num_batches_tracked == 4 * 5


def test_a_killed_run_of_a_real_network(toy_model, images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    two_epochs = Optimization(epochs=2, batch_size=8, lr=0.1)
    whole, killed, resumed = (copy.deepcopy(toy_model) for _ in range(3))
    fit(whole, images, two_epochs)
    with pytest.raises(KilledError):
        fit(killed, images, two_epochs, after_epoch=kill_after(1), checkpoint=checkpoint)
    fit(resumed, images, two_epochs, checkpoint=checkpoint)
    same_bits(resumed, whole)


def test_a_finished_checkpoint_trains_no_more(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    first, second = Stateful(0), Stateful(1)
    history = fit(first, images, checkpoint=checkpoint)
    assert fit(second, images, checkpoint=checkpoint) == history
    same_bits(first, second)
    assert not second.training
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove()  # what is gone needs no removing


def test_checkpoint_of_other_settings_is_ignored(images, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    fresh, model = Stateful(0), Stateful(0)
    fit(fresh, images)
    with pytest.raises(KilledError):
        fit(Stateful(1), images, after_epoch=kill_after(2), checkpoint=Checkpoint(path, "lr 0.2"))
    history = fit(model, images, checkpoint=Checkpoint(path, "lr 0.1"))
    assert len(history) == 4
    same_bits(model, fresh)


def test_truncated_checkpoint(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "same")
    fit(Stateful(0), images, checkpoint=checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: not a whole"):
        fit(Stateful(0), images, checkpoint=checkpoint)
