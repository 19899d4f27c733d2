"""Runs a shard: one defense on one model, draw by draw; each ends as repaired weights or a reason."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from detrojan import rng as streams
from detrojan.cells import Shard
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError, NotApplicableError, TryAgainError
from detrojan.images import DefenderSample, empty
from detrojan.learning import inference
from detrojan.learning.meter import meter
from detrojan.models import Classifier
from detrojan.stages.rows import run_row
from detrojan.storage import artifacts
from detrojan.storage.columns import DIVERGED, NOT_APPLICABLE, OK, OUT_OF_MEMORY, cell_key

logger = logging.getLogger(__name__)

OWN_CONTEXT = 2**30  # bytes of a GPU that a process takes besides its tensors, at most: CUDA itself


def run_shard(
    defense: Defense,
    model: Classifier,
    samples: dict[int, DefenderSample],
    shard: Shard,
    weights: Path,
    *,
    code: str,
    sources: Mapping[str, str] | None = None,
    deviates: bool = False,
    tries_left: int = 0,
) -> list[dict[str, Any]]:
    """Defend ``model`` once a draw; write the repaired weights; return rows of ``RUNS``.

    A defense that diverges, runs out of memory or can't apply becomes a row with its reason and no
    weights. Any other error is a bug and is raised.

    Raises:
        TryAgainError: a draw ran out of memory, and another try may have more.

    Args:
        defense: what to run.
        model: the untouched classifier, on the device to run on; it is not changed.
        samples: the defender's sample of each draw, on the CPU.
        shard: names the random streams.
        weights: a folder that exists, to write them to.
        code: digest of the code that runs, kept with each row.
        sources: whose value each setting of the defense is, likewise.
        deviates: whether the study has set others than the protocol's, likewise.
        tries_left: how often the job will be tried again, with more memory, if it fails.
    """
    device = next(model.parameters()).device
    settings = defense.model_dump()
    rows = []
    for draw in shard.draws.numbers():
        logger.info("draw %d", draw)
        # No samples at all: a data_free method, which gets an empty one to note its choices in.
        sample = (samples[draw] if samples else _empty_sample(model)).to(device)
        rng = streams.stream("defend", *shard.model, shard.defense, shard.spc, draw)
        outcome: dict[str, Any] = {"status": OK, "reason": None}
        with meter(device) as cost, _reasons(outcome):
            repaired = _repair(defense, model, sample, rng)
        if outcome["status"] == OUT_OF_MEMORY:
            _explain(outcome, draw, device, tries_left)
        if outcome["status"] == OK:
            path = weights / f"draw-{draw}.safetensors"
            artifacts.write_model(repaired, path, cell=cell_key(shard, draw))
        else:
            logger.warning("draw %d: %s: %s", draw, outcome["status"], outcome["reason"])
        row = run_row(
            *(shard, draw, outcome, settings, sample.chosen, cost, code),
            images=len(sample.train) + len(sample.validation),
            sources=sources,
            deviates=deviates,
        )
        rows.append(row)
    return rows


def _repair(defense: Defense, model: Classifier, sample: DefenderSample, rng: torch.Generator) -> Classifier:
    if len(sample.train) and _spc(sample) < defense.min_spc:
        raise NotApplicableError(
            f"needs {defense.min_spc} clean samples per class, to choose on some and fit to others; "
            f"there is {_spc(sample)}"
        )
    repaired = defense(model, sample, rng=rng).eval()
    assert isinstance(repaired, Classifier), f"a defense should return a classifier, not {type(repaired)}"
    artifacts.check_finite(repaired, "the repaired model")
    # Finite weights can still overflow: a variance near zero, a channel scaled out of range.
    if len(sample.train) and not bool(inference.logits(repaired, sample.train).isfinite().all()):
        raise DivergedError("the repaired model's logits of the defender's own images are not finite")
    return repaired


def _spc(sample: DefenderSample) -> int:
    return int(torch.bincount(sample.everything.labels).max())


def _empty_sample(model: Classifier) -> DefenderSample:
    nothing = empty(model.build.num_classes)
    return DefenderSample(nothing, nothing)


@contextlib.contextmanager
def _reasons(outcome: dict[str, Any]) -> Iterator[None]:
    """Turn the errors that are results into ``outcome``; let bugs through."""
    try:
        yield
    except NotApplicableError as error:
        outcome |= {"status": NOT_APPLICABLE, "reason": str(error)}
    except DivergedError as error:
        outcome |= {"status": DIVERGED, "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        outcome |= {"status": OUT_OF_MEMORY, "reason": _first_line(error)}
    except RuntimeError as error:
        # torch's CPU allocator has no error class of its own.
        if "can't allocate memory" not in str(error):
            raise
        outcome |= {"status": OUT_OF_MEMORY, "reason": _first_line(error)}
    finally:
        if outcome["status"] == OUT_OF_MEMORY and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _explain(outcome: dict[str, Any], draw: int, device: torch.device, tries_left: int) -> None:
    """Add to the reason what others hold of the GPU; raise if another try may end better."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        if others < OWN_CONTEXT:
            return  # the next try gets such a GPU again
        held, whole, left = (f"{size / 2**30:.1f}" for size in (others, total, free))
        outcome["reason"] += f" (others held {held} of the GPU's {whole} GiB, {left} were free)"
    if tries_left:
        raise TryAgainError(
            f"draw {draw} ran out of memory: {outcome['reason']}; the job is tried again with twice as much, "
            f"{tries_left} times at most"
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
