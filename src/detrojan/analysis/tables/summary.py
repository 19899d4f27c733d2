"""Means over draws and models, a row a setting and defense, with intervals by how these two are crossed."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics import crossed, harm
from detrojan.analysis.statistics.crossed import Array
from detrojan.analysis.statistics.frames import SETTING, clipped, frame_of, table
from detrojan.analysis.statistics.relative import MEASURES, SHARES
from detrojan.analysis.tables.base import Table, as_in_cells, columns
from detrojan.storage.columns import OK

KEY = [*SETTING, "attack_took", "defense", "threat_model", "spc"]
ENDS = ("mean", "low", "high")
OF_MEASURES = {
    "acc": "mean ACC and its 95 % [interval](statistics.md#intervals)",
    "asr": "the same of ASR",
    "ra": "the same of RA",
    "acc_drop": "the same of the accuracy lost",
    "asr_reduction": "the same of the attack success removed",
    "ra_recovery": "the same of the RA won back",
    "acc_drop_ratio": "the same of `acc_drop_ratio`",
    "asr_reduction_ratio": "the same of `asr_reduction_ratio`",
    "ra_recovery_ratio": "the same of `ra_recovery_ratio`",
    "der": "the same of DER",
    "net": "the same of the attack success removed minus the accuracy lost",
}
TABLE = Table(
    row="a setting and defense",
    holds="means and intervals",
    about="""\
A setting is everything but seed and draw. A mean is over models, each by its own mean over draws. Models
whose attack took and models whose attack did not are never averaged together: a setting with both has a row
for each.""",
    columns=[
        as_in_cells("dataset", "architecture", "attack", "ratio", meaning="the setting"),
        columns(
            "attack_took",
            kind=pa.bool_(),
            meaning="whether the attack of these models passed the gate; null for clean models; rankings "
            "leave out false",
            null=True,
        ),
        as_in_cells("defense", "threat_model", "spc", meaning="the defense and its data budget"),
        columns("num_cells", kind=pa.int32(), meaning="planned cells"),
        columns(
            "num_ok",
            kind=pa.int32(),
            meaning="of these, with status `ok`: the ones that the measures are over",
        ),
        columns("num_models", kind=pa.int32(), meaning="models among them"),
        *(
            columns(
                *(f"{measure}_{end}" for end in ENDS),
                kind=pa.float64(),
                meaning=OF_MEASURES[measure],
                null=True,
            )
            for measure in MEASURES
        ),
        columns(
            "interval_over",
            kind=pa.string(),
            meaning="what varies within the interval: `models_draws`, `models`, or `draws` of the one model "
            "there is; null: one value, no interval; nor is there one where all values are alike",
            null=True,
            words=True,
        ),
        columns(
            "verdict",
            kind=pa.string(),
            meaning="`harmful`, `unchanged` or `repaired`: `net` is below 0, about 0, or above it, by more "
            "than a point and than [noise](statistics.md#harm); null for clean models, or without a result",
            null=True,
            words=True,
        ),
        columns("seconds", kind=pa.float64(), meaning="mean wall time of the defense", null=True),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a setting and defense: means of all measures over the cells that ended well.

    A mean is over models, each by its own mean over draws. Its 95 % interval is of models and draws, which
    are crossed (:func:`.crossed.of_settings`); of one model it says nothing of others. ``interval_over``
    tells which. Ends are null where there is one value only, or where all are alike. Models whose attack
    took and models whose attack did not are rows of their own.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    ok = frame["status"] == OK
    groups = frame.assign(is_ok=ok, ok_seed=frame["seed"].where(ok), ok_seconds=frame["seconds"].where(ok))
    grouped = groups.groupby(KEY, dropna=False, sort=True, observed=True)
    counts = grouped.agg(
        num_cells=("is_ok", "size"),
        num_ok=("is_ok", "sum"),
        num_models=("ok_seed", "nunique"),
        seconds=("ok_seconds", "mean"),
    )
    values = _Values(frame, grouped.ngroup().to_numpy(), ok.to_numpy())
    # Cells that did not end well have no measures, and their setting keeps its row.
    means = {measure: crossed.of_settings(values.of(measure)) for measure in MEASURES}
    rows = counts.reset_index().assign(
        **{f"{measure}_{end}": getattr(found, end) for measure, found in means.items() for end in ENDS},
        interval_over=means["acc"].basis,
        verdict=_verdicts(values, means["net"].mean),
    )
    return table(clipped(rows, SHARES), TABLE.schema)


class _Values:
    """The columns of cells by row of the table: arrays of (rows, models, draws)."""

    def __init__(self, frame: pd.DataFrame, rows: npt.NDArray[Any], ok: npt.NDArray[Any]) -> None:
        self._frame, self._ok = frame, ok
        axes = [np.unique(frame[axis].to_numpy(), return_inverse=True)[1] for axis in ("seed", "draw")]
        self._at = (rows, *axes)
        self._shape = tuple(int(codes.max(initial=-1)) + 1 for codes in self._at)

    def of(self, column: str) -> Array:
        """Return a column, NaN where there is no cell, or none that ended well."""
        array = np.full(self._shape, np.nan)
        array[self._at] = np.where(self._ok, self._frame[column].to_numpy(float), np.nan)
        return array


def _verdicts(values: _Values, net: Array) -> harm.Verdicts:
    """Return what a defense has done to each setting."""

    def flat(column: str) -> Array:
        array = values.of(column)
        return array.reshape(len(array), math.prod(array.shape[1:]))

    noise = harm.noise(
        flat("net"),
        (flat("acc"), -flat("acc_drop"), flat("num_test")),
        (flat("asr"), -flat("asr_reduction"), flat("num_triggered")),
    )
    return harm.verdicts(net, noise)
