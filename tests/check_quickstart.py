"""Check what the quickstart made: ``python tests/check_quickstart.py results``."""

import sys
from pathlib import Path

import pandas as pd

results = Path(sys.argv[1])
cells = pd.read_parquet(results / "tables" / "cells.parquet")
models = pd.read_parquet(results / "tables" / "models.parquet").set_index("attack")

# 3 models: untouched and CLP once each; FT, FP and Grad-Prune at 2 SPC and 3 draws, MM-BD at one SPC.
assert set(cells["protocol"]) == {"none", "paper"}, cells["protocol"]
assert len(cells) == 3 * (2 + 3 * 2 * 3 + 3), len(cells)
not_ok = cells[cells["status"] != "ok"]
assert set(zip(not_ok["attack"], not_ok["defense"], not_ok["status"], strict=True)) == {
    ("none", "grad_prune", "not_applicable")
}

# The attacks took, and cost no accuracy; the gate says so, of every cell.
for attack in ("badnets", "blended"):
    assert models.loc[attack, "asr"] >= 0.9, models["asr"]
    assert models.loc[attack, "acc_loss"] <= 0.02, models["acc_loss"]
    assert cells.loc[cells["attack"] == attack, "attack_took"].all(), models["gate_reason"]
    assert models.loc[attack, "label_map"] == "all_to_one", models["label_map"]
    assert models.loc[attack, ["psnr", "ssim", "linf"]].notna().all(), models
assert models["attack_took"].notna().sum() == 2, models["attack_took"]
assert models["gate_reason"].isna().all(), models["gate_reason"]
assert models["trigger_weakness"].isna().all(), models["trigger_weakness"]

# MM-BD, given clean images alone, takes BadNets away at little cost; every defense changes some model.
mean = cells.groupby(["attack", "defense", "spc"])[["acc", "asr"]].mean()
badnets = mean.loc["badnets"]
repaired = badnets[
    (badnets["asr"] < models.loc["badnets", "asr"] / 10)
    & (badnets["acc"] > models.loc["badnets", "acc"] - 0.1)
]
assert "mm_bd" in repaired.index.get_level_values("defense"), badnets
untouched = mean.xs("none", level="defense").droplevel("spc")
for defense, rows in mean.groupby(level="defense"):
    of_untouched = untouched.loc[rows.index.get_level_values("attack")].to_numpy()
    assert defense == "none" or (abs(rows - of_untouched) > 0.001).to_numpy().any(), defense

page = (results / "report" / "index.html").read_text()
assert "default-src 'none'" in page, "the report may ask for the network"
for name in ("effect", "heatmap", "triggers-digits"):
    for kind in ("svg", "png", "pdf"):
        picture = results / "report" / "figures" / f"{name}.{kind}"
        assert picture.stat().st_size > 0, picture
ranking = pd.read_csv(results / "report" / "tables" / "ranking_der.csv")
assert set(ranking["defense"]) == {"untouched", "ft", "fp", "clp", "mm_bd", "grad_prune"}, ranking
