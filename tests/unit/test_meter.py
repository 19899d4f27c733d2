"""The meter counts images through the network, whatever copy of it they go through."""

import copy

import pytest
import torch

from detrojan.learning.meter import meter

CPU = torch.device("cpu")


def images(count):
    return torch.full((count, 3, 8, 8), 0.5)


def test_counts_images_forward_and_backward(toy_model):
    with meter(CPU) as cost:
        toy_model(images(3)).sum().backward()
        toy_model(images(2))  # no backward pass
        with torch.inference_mode():
            toy_model(images(5))
    assert (cost.forward_passes, cost.backward_passes) == (10, 3)


def test_counts_the_gradient_of_the_input_too(toy_model):
    toy_model.requires_grad_(False)
    pixels = images(4).requires_grad_()
    with meter(CPU) as cost:
        toy_model(pixels).sum().backward()
    assert (cost.forward_passes, cost.backward_passes) == (4, 4)


def test_counts_every_copy(toy_model):
    copied = copy.deepcopy(toy_model)
    with meter(CPU) as cost:
        copied(images(3)).sum().backward()
        copy.deepcopy(copied)(images(1))
        toy_model(images(2)).sum().backward()
    assert (cost.forward_passes, cost.backward_passes) == (6, 5)


def test_parts_of_the_network_do_not_count(toy_model):
    with meter(CPU) as cost, torch.no_grad():
        toy_model.network.linear(toy_model.network.avgpool(torch.rand(7, 32, 2, 2)).flatten(1))
    assert cost.forward_passes == 0


def test_a_second_backward_pass_counts(toy_model):
    with meter(CPU) as cost:
        loss = toy_model(images(3)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert (cost.forward_passes, cost.backward_passes) == (3, 6)


def test_measures_time_memory_and_device():
    with meter(CPU) as cost:
        kept = torch.ones(25_000_000)  # 100 MB
    assert kept.nbytes < cost.peak_memory_bytes < 100 * kept.nbytes
    assert 0 < cost.seconds < 60
    assert cost.device == "cpu"


def test_removes_its_hook(toy_model):
    with meter(CPU) as cost:
        toy_model(images(1))
    toy_model(images(1))
    assert cost.forward_passes == 1
    with pytest.raises(RuntimeError, match="stop"), meter(CPU) as failed:
        raise RuntimeError("stop")
    toy_model(images(1))
    assert failed.forward_passes == 0
