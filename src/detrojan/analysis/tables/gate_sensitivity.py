"""What the study would say at other gates: a limit is a choice, and a lead should not hang on it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.arrays import Flags, Study
from detrojan.analysis.statistics.frames import SETTING, frame_of, table_of_rows
from detrojan.analysis.statistics.gate import SLACK
from detrojan.analysis.tables.base import Table, columns
from detrojan.analysis.tables.leads import MEASURE
from detrojan.cells import MODEL_AXES, NO_METHOD

Row = dict[str, Any]
LIMITS = (0.5, 0.7, 0.8, 0.9)  # of ASR, beside the study's own
SAME = 9  # decimals of ranks

TABLE = Table(
    row="a limit and defense",
    holds="ranks and effects if the gate asked for another ASR",
    about="""\
By DER, pooled over budgets. The models are those whose attack would take at that limit, all else as the gate
has it. It isn't made of tables whose gate nobody knows.""",
    columns=[
        columns("min_asr", kind=pa.float64(), meaning="the smallest ASR of an attack that takes"),
        columns("is_study", kind=pa.bool_(), meaning="whether that is the study's own limit"),
        columns("defense", kind=pa.string(), meaning="the defense"),
        columns("num_models", kind=pa.int32(), meaning="models whose attack takes at that limit"),
        columns("num_settings", kind=pa.int32(), meaning="settings in which the defense has a result"),
        columns(
            *("der_mean", "net_mean"),
            kind=pa.float64(),
            meaning="means of DER and of `net` over these settings",
            null=True,
        ),
        columns("mean_rank", kind=pa.float64(), meaning="from pairs; null if it is not ranked", null=True),
        columns("leads", kind=pa.bool_(), meaning="whether that is the best one, or equal to it"),
    ],
)


def make(cells: pa.Table, gate: pa.Table) -> pa.Table:
    """Return a row a limit and defense, the lowest limit first.

    Args:
        cells: with the columns of ``CELLS``.
        gate: of the schema ``GATE``.
    """
    judged = gate.to_pylist()
    if not judged:
        return table_of_rows([], TABLE.schema)
    own = judged[0]["min_asr"]
    asr = {tuple(row[axis] for axis in MODEL_AXES): row["asr_judged"] for row in judged}
    passing = {tuple(row[axis] for axis in MODEL_AXES) for row in judged if row["passes_otherwise"]}
    frame = frame_of(cells)
    keys = list(zip(*(frame[axis] for axis in MODEL_AXES), strict=True))
    study = arrays.of_cells(scores.attacked(frame.assign(attack_took=[key in passing for key in keys])))
    of_models = _asr(study, {key: asr[key] for key in passing})
    rows = []
    for limit in sorted({*LIMITS, own}):
        took = of_models >= limit - SLACK
        rows += [row | {"is_study": limit == own} for row in _rows(study.only(took), took, limit)]
    return table_of_rows(rows, TABLE.schema)


def _asr(study: Study, asr: Mapping[tuple[Any, ...], float]) -> "np.typing.NDArray[np.float64]":
    """Return what the gate judged each model by, (settings, seeds); NaN where there is no model."""
    settings = list(study.settings[list(SETTING)].itertuples(index=False, name=None))
    found = [[asr.get((*setting, seed), np.nan) for seed in study.seeds] for setting in settings]
    return np.array(found, float).reshape(len(settings), len(study.seeds))


def _rows(study: Study, took: Flags, limit: float) -> list[Row]:
    """Return the rows of a limit, of the study of those models alone."""
    found = ranking.of_study(study, MEASURE, None)
    ranks = dict(found.by_rank) if found else {}
    best = round(min(ranks.values(), default=np.nan), SAME)
    rows = []
    for name in study.runs:
        if name == NO_METHOD:
            continue
        der, net = (study.crossed(name, measure) for measure in (MEASURE, "net"))
        mean_rank = ranks.get(name, np.nan)
        rows.append(
            {
                "min_asr": limit,
                "defense": name,
                "num_models": int(took.sum()),
                "num_settings": der.num_settings,
                "der_mean": der.mean,
                "net_mean": net.mean,
                "mean_rank": mean_rank,
                "leads": bool(round(mean_rank, SAME) == best),
            }
        )
    return rows
