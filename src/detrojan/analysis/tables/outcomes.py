"""How all cells ended, by defense and reason: what no mean tells."""

import pyarrow as pa

from detrojan.analysis.statistics.frames import frame_of, table
from detrojan.analysis.tables.base import Table, columns
from detrojan.cells import NO_METHOD
from detrojan.storage.columns import OK

GATE_FAILED = "gate_failed"
NO_VERDICT = "no_verdict"
REASONS = {
    GATE_FAILED: "the attack did not take: there is no backdoor to remove",
    NO_VERDICT: "the untouched model has no result, so whether its attack took is not known",
}

TABLE = Table(
    row="a defense, budget, outcome and reason",
    holds="how all cells ended",
    about="Every cell counts once.",
    columns=[
        columns("defense", "threat_model", kind=pa.string(), meaning="the defense"),
        columns("spc", kind=pa.int32(), meaning="the budget"),
        columns(
            "outcome",
            kind=pa.string(),
            meaning="a `status`; or `gate_failed` where a cell ended well on a model whose attack did not "
            "take, `no_verdict` where its untouched model has no result",
            words=True,
        ),
        columns("reason", kind=pa.string(), meaning="why; null for `ok`", null=True),
        columns("num_cells", kind=pa.int32(), meaning="cells"),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return how many cells of each defense and budget had each outcome, with the reason.

    Every cell counts once. ``ok`` are those that means and ranks are over. A cell that ended well on a model
    whose attack failed the gate has the outcome ``gate_failed``; one whose model's attack was not judged,
    ``no_verdict``. Any other keeps its status and reason.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    ended, is_attacked = frame["status"] == OK, frame["attack"] != NO_METHOD
    took = frame["attack_took"]
    failed = ended & is_attacked & ~took.fillna(True).astype(bool)
    unjudged = ended & is_attacked & took.isna()
    outcome = frame["status"].mask(failed, GATE_FAILED).mask(unjudged, NO_VERDICT)
    reason = frame["reason"].mask(ended).where(~outcome.isin(REASONS), outcome.map(REASONS))
    keys = TABLE.schema.names[:-1]
    counted = frame.assign(outcome=outcome, reason=reason).groupby(keys, dropna=False, observed=True).size()
    return table(counted.rename("num_cells").reset_index(), TABLE.schema)
