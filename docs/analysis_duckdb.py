# %% [markdown]
# # A study in SQL
#
# DuckDB queries the Parquet files where they lie, also those that are larger than memory. `python
# docs/analysis_duckdb.py [results]` prints all of this for a finished study, and checks it against pandas.
# VS Code opens the file as a notebook, and so does Jupyter with Jupytext.

# %%
import sys
from pathlib import Path

import duckdb
import numpy as np

import detrojan

# A notebook runs in docs/, and the arguments it sees are Jupyter's.
RESULTS = Path("../results" if "ipykernel" in sys.modules else sys.argv[1] if sys.argv[1:] else "results")

database = duckdb.connect()
database.read_parquet(str(RESULTS / "tables" / "cells.parquet")).create_view("cells")


def show(relation):
    """Print a query's result."""
    print(relation.df().round(3).to_string(index=False), "\n")


# %% [markdown]
# ## How cells ended

# %%
show(database.sql("SELECT defense, status, count(*) AS cells FROM cells GROUP BY ALL ORDER BY ALL"))

# %% [markdown]
# ## Means that respect how cells are nested
#
# Draws are nested in models, models in settings. Each `GROUP BY` takes one level: draws, then models. The
# last one is over settings, in the queries below. Models without a working backdoor don't count
# (`attack_took`).

# %%
database.sql("""
    CREATE VIEW of_models AS
    SELECT defense, spc, dataset, architecture, attack, ratio, seed,
           avg(acc) AS acc, avg(asr) AS asr, avg(ra) AS ra, avg(der) AS der
    FROM cells
    WHERE attack_took AND status = 'ok' AND defense <> 'none'
    GROUP BY ALL
""")
database.sql("""
    CREATE VIEW of_settings AS
    SELECT defense, spc, dataset, architecture, attack, ratio,
           avg(acc) AS acc, avg(asr) AS asr, avg(ra) AS ra, avg(der) AS der, count(*) AS models
    FROM of_models
    GROUP BY ALL
""")
means = database.sql("""
    SELECT defense, spc, count(*) AS settings,
           avg(acc) AS acc, avg(asr) AS asr, avg(ra) AS ra, avg(der) AS der
    FROM of_settings
    GROUP BY ALL
    ORDER BY defense, spc
""")
show(means)

# %% [markdown]
# ## Defense × attack
#
# At the largest budget; a data-free defense (`spc` 0) stands beside all of them.

# %%
database.sql("""
    CREATE VIEW at_budget AS
    SELECT * FROM of_settings WHERE spc IN (0, (SELECT max(spc) FROM of_settings))
""")
asr = database.sql("PIVOT at_budget ON attack USING avg(asr) GROUP BY defense ORDER BY defense")
show(asr)

# %% [markdown]
# ## The worst tenth
#
# Of each defense's settings the tenth with the lowest DER, at least one.

# %%
worst = database.sql("""
    WITH placed AS (
        SELECT defense, der,
               row_number() OVER (PARTITION BY defense ORDER BY der) AS place,
               count(*) OVER (PARTITION BY defense) AS settings
        FROM at_budget
    )
    SELECT defense, avg(der) AS worst_tenth
    FROM placed
    WHERE place <= ceil(settings / 10)
    GROUP BY defense
    ORDER BY worst_tenth DESC
""")
show(worst)

# %% [markdown]
# ## What a defense wins over fine-tuning, pair by pair
#
# The same model, budget and draw number is the same clean sample, so two defenses can be compared sample by
# sample. A join finds the pairs.

# %%
pairs = database.sql("""
    SELECT a.defense, count(*) AS pairs, avg(a.der - b.der) AS difference, avg((a.der > b.der)::INT) AS won
    FROM cells AS a
    JOIN cells AS b USING (dataset, architecture, attack, ratio, seed, spc, draw)
    WHERE b.defense = 'ft' AND a.defense NOT IN ('ft', 'none')
      AND a.attack_took AND a.status = 'ok' AND b.status = 'ok'
    GROUP BY a.defense
    ORDER BY difference DESC
""")
show(pairs)

# %% [markdown]
# ## The same in pandas
#
# Two ways to one number, and they agree.

# %%
SETTING = ["dataset", "architecture", "attack", "ratio"]
KEYS = ["defense", "spc"]

cells = detrojan.read_cells(RESULTS)
counted = cells[cells["attack_took"].fillna(False) & (cells["status"] == "ok") & (cells["defense"] != "none")]
of_models = counted.groupby([*KEYS, *SETTING, "seed"], observed=True)[["acc", "asr", "ra", "der"]].mean()
of_settings = of_models.groupby([*KEYS, *SETTING], observed=True).mean()
expected = of_settings.groupby(KEYS, observed=True).mean().reset_index()
expected = expected.astype({"defense": str}).sort_values(KEYS)

found = means.df()
assert found["defense"].tolist() == expected["defense"].tolist()
assert found["spc"].tolist() == expected["spc"].tolist()
for measure in ("acc", "asr", "ra", "der"):
    np.testing.assert_allclose(found[measure], expected[measure], rtol=1e-12, atol=1e-12)
print(f"{len(found)} rows of means are the same in pandas.")
