"""Random streams: the same for equal names, and for nothing else."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from detrojan import rng as streams


def numbers(rng):
    return torch.rand(4, generator=rng).tolist()


def test_seed_is_the_head_of_a_digest():
    # The format must never change: it would shift every stream of every study.
    digest = hashlib.sha256(b'["train", "cifar10", 0.1, 3]').hexdigest()
    assert streams.seed("train", "cifar10", 0.1, 3) == int(digest[:16], 16) // 2


def test_names_do_not_run_together():
    seeds = {
        streams.seed(*names) for names in [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("ab", "c", "")]
    }
    assert len(seeds) == 5
    assert streams.seed("1") != streams.seed(1)


def test_equal_names_give_equal_streams():
    assert numbers(streams.stream("a", 1)) == numbers(streams.stream("a", 1))
    assert numbers(streams.stream("a", 1)) != numbers(streams.stream("a", 2))


def test_child_ignores_what_its_parent_drew():
    parent = streams.stream("parent")
    first = numbers(streams.child(parent, "epoch", 3))
    numbers(parent)
    assert numbers(streams.child(parent, "epoch", 3)) == first
    assert numbers(streams.child(parent, "epoch", 4)) != first
    assert numbers(streams.child(streams.stream("other parent"), "epoch", 3)) != first


def test_child_leaves_its_parent_alone():
    parent = streams.stream("parent")
    streams.child(parent, "x")
    assert numbers(parent) == numbers(streams.stream("parent"))


def test_global_stream_drives_layers_and_restores_the_state():
    before = torch.get_rng_state()
    dropped = []
    for names in (("a",), ("a",), ("b",)):
        with streams.global_stream(streams.stream(*names)):
            dropped.append(F.dropout(torch.ones(64)).tolist())
    assert dropped[0] == dropped[1] != dropped[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_global_stream_restores_the_state_after_an_error():
    def draw_and_stop():
        with streams.global_stream(streams.stream("a")):
            torch.rand(3)
            raise RuntimeError("stop")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"):
        draw_and_stop()
    assert torch.equal(torch.get_rng_state(), before)
