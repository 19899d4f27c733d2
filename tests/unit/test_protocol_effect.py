"""One protocol minus another, by hand: the only table in which they meet."""

import pytest

from detrojan.analysis import derived
from detrojan.analysis.tables.protocol_effect import TABLE, make
from tests.unit.tables import cell, of_rows, random_study, untouched


def study():
    rows = []
    for dataset, survey, paper in (("a", 0.9, 0.1), ("b", 0.7, 0.3)):
        rows += [untouched(dataset=dataset)]
        for draw in (0, 1):
            own = {"dataset": dataset, "draw": draw}
            rows.append(cell("ibau", asr=survey, protocol="survey", steps=5, **own))
            rows.append(cell("ibau", asr=paper - 0.02 * draw, protocol="paper", steps=50, **own))
        rows.append(cell("ft", asr=0.2, protocol="survey", dataset=dataset))
    return of_rows(*rows)


def test_pairs_by_hand():
    found = make(study()).to_pandas()
    assert set(found["defense"]) == {"ibau"}  # fine-tuning has one protocol
    [row] = found[(found["measure"] == "asr") & found["spc"].isna()].to_dict("records")
    assert (row["protocol"], row["other"], row["num_settings"]) == ("paper", "survey", 2)
    assert row["difference"] == pytest.approx(((0.1 + 0.08) / 2 - 0.9 + (0.3 + 0.28) / 2 - 0.7) / 2)
    assert (row["mean"], row["other_mean"]) == (pytest.approx(0.19), pytest.approx(0.8))
    assert (row["steps"], row["other_steps"]) == (50, 5)


def test_one_protocol_has_nothing_to_compare():
    assert make(random_study()).num_rows == 0
    assert make(random_study()).schema == TABLE.schema


def test_no_other_table_mixes_protocols():
    both = derived.make({"cells": study()})
    rows = study().to_pylist()
    for protocol in ("survey", "paper"):
        alone = of_rows(*(row for row in rows if row["protocol"] in (protocol, "none")))
        for name, table in derived.make({"cells": alone}).items():
            if not derived.TABLES[name].table.across:
                mixed = [row for row in both[name].to_pylist() if row["protocol"] == protocol]
                assert repr(mixed) == repr(table.to_pylist()), name
