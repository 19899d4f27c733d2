"""Each level beside its intervals: means and differences to fine-tuning, by hand."""

import numpy as np
import pytest

from detrojan.analysis.tables.levels import make as of_levels
from tests.unit.tables import cell, of_rows, untouched


def test_levels_by_hand():
    rows = []
    for dataset, attack, ft, anp in (("a", "p", 0.5, 0.1), ("a", "q", 0.5, 0.3), ("b", "p", 0.4, None)):
        axes = {"dataset": dataset, "attack": attack}
        rows += [untouched(**axes), cell("ft", asr=ft, **axes)]
        rows += [] if anp is None else [cell("anp", asr=anp, **axes)]
    rows += [untouched(dataset="b", attack="q"), cell("anp", asr=0.7, dataset="b", attack="q")]
    frame = of_levels(of_rows(*rows)).to_pandas()
    found = frame[(frame["measure"] == "asr") & frame["spc"].isna()].set_index(["defense", "axis", "level"])
    of_a = found.loc[("anp", "dataset", "a")]
    assert of_a["mean"] == pytest.approx(0.2)
    assert (of_a["difference_ft"], of_a["num_settings"]) == (pytest.approx(-0.3), 2)
    of_q = found.loc[("anp", "attack", "q")]
    assert (of_q["mean"], of_q["num_settings"], of_q["num_shared_ft"]) == (pytest.approx(0.5), 2, 1)
    assert of_q["difference_ft"] == pytest.approx(-0.2)
    of_b = found.loc[("anp", "dataset", "b")]
    assert np.isnan(of_b["difference_ft"])
    assert of_b["num_shared_ft"] == 0
    assert np.isnan(found.loc[("ft", "dataset", "a"), "difference_ft"])
    assert ("none", "attack", "p") in found.index
