rule aggregate:
    input:
        metrics=all_metrics,
        models=all_model_cards,
        triggers=all_trigger_cards,
        poisoned=all_poisoned_cards,
        triggered=all_triggered("card.json"),
    output:
        cells="results/tables/cells.parquet",
        models="results/tables/models.parquet",
        summary="results/tables/summary.parquet",
        ranks="results/tables/ranks.parquet",
        comparisons="results/tables/comparisons.parquet",
        consistency="results/tables/consistency.parquet",
        outcomes="results/tables/outcomes.parquet",
    log:
        "logs/aggregate.log",
    resources:
        mem_mb=memory("aggregate"),
        runtime=runtime("aggregate", thousand_shards),
    params:
        gate=study.gate.model_dump(),
        given_up=given_up_cells,
        code=code("aggregate"),
    script:
        "../scripts/aggregate.py"


# Figures and tables beside the page, as `detrojan.analysis.report.report` writes them.
FIGURES = ["ranking", "critical_difference", "effect", "heatmap", "spc", "ratio", "consistency", "cost"]
BY_MEASURE = ["ranking", "comparisons", "heatmap"]
LISTINGS = ["consistency", "outcomes", "reasons", "models"]


rule report:
    input:
        cells="results/tables/cells.parquet",
        models="results/tables/models.parquet",
        summary="results/tables/summary.parquet",
        ranks="results/tables/ranks.parquet",
        comparisons="results/tables/comparisons.parquet",
        consistency="results/tables/consistency.parquet",
        outcomes="results/tables/outcomes.parquet",
        examples=all_triggered("examples.parquet"),
    output:
        page=report("results/report/index.html", category="Report"),
        figures=report(expand("results/report/figures/{name}.svg", name=FIGURES), category="Figures"),
        sheets=report(
            expand("results/report/figures/triggers-{dataset}.svg", dataset=study.grid.datasets),
            category="Figures",
        ),
        on_paper=expand("results/report/figures/{name}.{kind}", name=FIGURES, kind=["png", "pdf"]),
        sheets_on_paper=expand(
            "results/report/figures/triggers-{dataset}.{kind}",
            dataset=study.grid.datasets,
            kind=["png", "pdf"],
        ),
        by_measure=expand(
            "results/report/tables/{name}_{measure}.{kind}",
            name=BY_MEASURE,
            measure=["der", "asr", "acc", "ra"],
            kind=["csv", "tex"],
        ),
        listings=expand("results/report/tables/{name}.{kind}", name=LISTINGS, kind=["csv", "tex"]),
    log:
        "logs/report.log",
    resources:
        mem_mb=memory("report"),
        runtime=runtime("report", thousand_shards),
    params:
        datasets=study.grid.datasets,
        gate=study.gate.model_dump(),
        draws=[str(draws) for draws in study.grid.draws],
        code=code("report", beside=sorted((registry.PACKAGE / "analysis/report/page").iterdir())),
    script:
        "../scripts/report.py"
