"""Means over draws and models, a row a setting and defense, with intervals that respect the nesting."""

import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics import bootstrap
from detrojan.analysis.statistics.frames import LEVELS, SETTING, clipped, frame_of, table
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
            meaning="what varies within the interval: `models`, or `draws` of the one model there is; null: "
            "one value, no interval",
            null=True,
            words=True,
        ),
        columns("seconds", kind=pa.float64(), meaning="mean wall time of the defense", null=True),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a setting and defense: means of all measures over the cells that ended well.

    A mean is over models, each by its own mean over draws. The 95 % interval (:mod:`.bootstrap`) is
    over models where there are two or more, else over the draws of the one model, which says nothing of
    other models; ``interval_over`` tells which. It is null where there is one value only. Models
    whose attack took and models whose attack did not are rows of their own.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    ok = frame["status"] == OK
    groups = frame.assign(is_ok=ok, ok_seed=frame["seed"].where(ok), ok_seconds=frame["seconds"].where(ok))
    counts = groups.groupby(KEY, dropna=False, sort=True, observed=True).agg(
        num_cells=("is_ok", "size"),
        num_ok=("is_ok", "sum"),
        num_models=("ok_seed", "nunique"),
        seconds=("ok_seconds", "mean"),
    )
    # Cells that did not end well have no measures, and their setting keeps its row.
    means = clipped(bootstrap.intervals(frame, KEY, MEASURES, LEVELS), SHARES)
    counts = counts.reset_index(drop=True)
    means = means.rename(columns={"acc_over": "interval_over"})
    return table(pd.concat([means, counts], axis="columns"), TABLE.schema)
