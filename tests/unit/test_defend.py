"""A shard: which errors become rows, what a row says, and that a bug is no row."""

import copy
import dataclasses
import json

import pytest
import torch

from detrojan.cells import Draws, Model, Shard
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError, TryAgainError
from detrojan.images import to_float
from detrojan.stages import defend, sampling
from detrojan.storage.columns import DIVERGED, NOT_APPLICABLE, OK, OUT_OF_MEMORY, RUNS

SHARD = Shard(Model("toy", "preactresnet18", "badnets", 0.1, 0), "planted", 2, Draws(0, 1))


class Planted(Defense):
    """Ends as told on draw 0 and well on draw 1, after one forward and backward pass."""

    how: str

    def __call__(self, model, clean, *, rng):
        repaired = copy.deepcopy(model)
        repaired(to_float(clean.train.images)).sum().backward()
        clean.chosen["threshold"] = 0.25
        if clean.train.index[0] == self.first_index:
            repaired = self.end(repaired)
        return repaired

    first_index: int = 0

    def end(self, repaired):
        match self.how:
            case "nan":
                next(repaired.parameters()).data[0] = torch.nan
            case "overflow":  # finite weights, but the logits are not
                repaired.network.conv1.weight.data.fill_(3e38)
            case "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
            case "cpu":
                torch.empty(2**62, dtype=torch.uint8)
            case "python":
                raise MemoryError
            case "not applicable":
                raise NotApplicableError("no batch normalization")
            case "type error":
                raise TypeError("a bug")
            case "runtime error":
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            case "value error":
                raise ValueError("a bug too")
        return repaired


@pytest.fixture
def run(toy_model, toy_images, tmp_path):
    samples = sampling.draw_samples(toy_images(count=16), "toy", 2, range(2))

    def run(how, tries_left=0):
        defense = Planted(how=how, first_index=int(samples[0].train.index[0]))
        clean = {draw: dataclasses.replace(sample, chosen={}) for draw, sample in samples.items()}
        return defend.run_shard(
            defense, toy_model, clean, SHARD, tmp_path, code="digest", tries_left=tries_left
        )

    return run


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("nan", DIVERGED, "network.conv1.weight"),
        ("overflow", DIVERGED, "logits"),
        ("cuda", OUT_OF_MEMORY, "CUDA out of memory. Tried to allocate 2 GiB"),
        ("cpu", OUT_OF_MEMORY, "can't allocate memory"),
        ("python", OUT_OF_MEMORY, "MemoryError"),
        ("not applicable", NOT_APPLICABLE, "no batch normalization"),
    ],
)
def test_a_result_without_weights_is_a_row_with_its_reason(run, tmp_path, how, status, reason):
    failed, fine = run(how)
    assert failed["status"] == status
    assert reason in failed["reason"]
    assert "\n" not in failed["reason"]
    # The next draw runs as if nothing had happened.
    assert (fine["status"], fine["reason"]) == (OK, None)
    assert [path.name for path in tmp_path.iterdir()] == ["draw-1.safetensors"]


@pytest.mark.parametrize("how", ["cpu", "python", "cuda"])
def test_out_of_memory_is_tried_again_with_more_before_it_is_a_row(run, how):
    with pytest.raises(
        TryAgainError, match=r"^draw 0 ran out of memory: .*tried again with twice as much, 2 t"
    ):
        run(how, tries_left=2)
    assert run("nan", tries_left=2)[0]["status"] == DIVERGED


@pytest.mark.parametrize("others", [0.4, 30.0])
def test_on_a_gpu_only_what_others_hold_may_be_less_the_next_time(monkeypatch, others):
    free, own = 2 * 2**30, 40 * 2**30
    total = free + own + int(others * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own)
    alone, last = {"reason": "CUDA out of memory."}, {"reason": "CUDA out of memory."}
    defend._explain(last, 0, torch.device("cuda"), tries_left=0)
    if others < 1:
        defend._explain(alone, 0, torch.device("cuda"), tries_left=2)
        assert alone == last == {"reason": "CUDA out of memory."}
    else:
        assert last["reason"].endswith("(others held 30.0 of the GPU's 72.0 GiB, 2.0 were free)")
        with pytest.raises(TryAgainError, match=r"others held 30\.0 of the GPU's 72\.0 GiB"):
            defend._explain(alone, 0, torch.device("cuda"), tries_left=2)


@pytest.mark.parametrize("how", ["type error", "runtime error", "value error"])
def test_a_bug_fails_the_job(run, how):
    with pytest.raises((TypeError, RuntimeError, ValueError), match=r"bug|mat1"):
        run(how)


def test_a_row_says_what_was_chosen_what_it_cost_and_where_it_comes_from(run):
    row = run("fine")[0]
    assert set(row) == set(RUNS.names)
    assert {axis: row[axis] for axis in ("attack", "defense", "spc", "draw")} == {
        "attack": "badnets",
        "defense": "planted",
        "spc": 2,
        "draw": 0,
    }
    assert json.loads(row["chosen"]) == {"threshold": 0.25}
    assert json.loads(row["hyperparameters"])["how"] == "fine"
    # One training image per class of four: one pass each way, and a look at the finished logits.
    assert (row["forward_passes"], row["backward_passes"]) == (4 + 4, 4)
    assert row["peak_memory_bytes"] > 0
    assert row["code"] == "digest"
    assert json.loads(row["versions"])["torch"] == torch.__version__


def test_data_free_methods_get_no_images(toy_model, tmp_path):
    seen = []

    class DataFree(Defense):
        def __call__(self, model, clean, *, rng):
            seen.append(clean)
            clean.chosen["pruned"] = []
            return copy.deepcopy(model)

    shard = SHARD._replace(spc=0, draws=Draws(0, 0))
    (row,) = defend.run_shard(DataFree(), toy_model, {}, shard, tmp_path, code="")
    assert row["status"] == OK
    assert len(seen[0].train) == len(seen[0].validation) == 0
    assert seen[0].triggered is None
