"""A study under several protocols: one more runs its own cells alone, and nothing mixes them."""

import json

from detrojan.cells import NO_METHOD


def test_another_protocol_runs_its_cells_alone(workshop):
    before = workshop.table("cells")
    study = workshop.study()
    study["grid"]["protocols"] = ["survey", "paper"]
    study["defenses"]["ft"]["overrides"] = [{"when": {"protocol": "paper"}, "set": {"min_steps": 6}}]
    workshop.write(study)
    planned = workshop.planned()
    # FT and CLP on both models; Grad-Prune on the attacked one and, as a reason, on the clean one.
    assert {rule: planned.get(rule, 0) for rule in ("train", "sample", "stamp", "defend")} == {
        "train": 0,
        "sample": 0,
        "stamp": 0,
        "defend": 6,
    }
    workshop.snakemake()
    rows = workshop.table("cells").to_pylist()
    survey = [row for row in rows if row["protocol"] != "paper"]
    assert survey == before.to_pylist()
    assert {row["protocol"] for row in survey if row["defense"] == NO_METHOD} == {NO_METHOD}
    _says_what_it_took(rows)
    _keeps_protocols_apart(workshop)


def _says_what_it_took(rows):
    """Fine-tuning on twenty images: a pass a step, so that a floor in steps is one in passes."""
    found = {row["protocol"]: row for row in rows if (row["attack"], row["defense"]) == ("badnets", "ft")}
    for protocol, steps in {"survey": 1, "paper": 6}.items():
        row = found[protocol]
        assert (row["steps"], row["images_a_step"], row["passes"]) == (steps, 20, steps)
        assert row["deviates"]
        assert json.loads(row["sources"])["epochs"] == "study"
    assert json.loads(found["survey"]["sources"])["lr"] == "survey"
    clp = [row for row in rows if (row["attack"], row["defense"]) == ("badnets", "clp")]
    first, second = ({name: row[name] for name in ("acc", "asr", "ra", "chosen")} for row in clp)
    # At ten classes both protocols have the same settings: then the same numbers.
    assert first == second
    assert clp[0]["steps"] == 0
    assert clp[0]["passes"] is None


def _keeps_protocols_apart(workshop):
    ranks = workshop.table("summary").to_pylist()
    assert {row["protocol"] for row in ranks} == {"survey", "paper"}
    effect = workshop.table("protocol_effect").to_pylist()
    [of_clp] = [r for r in effect if (r["defense"], r["measure"], r["spc"]) == ("clp", "asr", None)]
    assert (of_clp["protocol"], of_clp["other"], of_clp["difference"]) == ("paper", "survey", 0)
    page, other = (
        (workshop.folder / "results/report" / name).read_text() for name in ("index.html", "paper/index.html")
    )
    assert '<a href="paper/index.html">paper</a>' in page
    assert '<a href="../index.html">survey</a>' in other
