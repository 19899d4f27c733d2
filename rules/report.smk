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


rule report:
    input:
        cells="results/tables/cells.parquet",
        models="results/tables/models.parquet",
        summary="results/tables/summary.parquet",
        examples=all_triggered("examples.parquet"),
    output:
        page=report("results/report/index.html", category="Report"),
        figure=report("results/report/effect.svg", category="Figures"),
        sheets=report(
            expand("results/report/triggers-{dataset}.svg", dataset=study.grid.datasets), category="Figures"
        ),
        pictures=expand("results/report/triggers-{dataset}.png", dataset=study.grid.datasets),
    log:
        "logs/report.log",
    resources:
        mem_mb=memory("report"),
        runtime=runtime("report", thousand_shards),
    params:
        datasets=study.grid.datasets,
        gate=study.gate.model_dump(),
        example=lambda wildcards: next(reversed(metrics_files()), ""),
        code=code("report", beside=[registry.PACKAGE / "analysis/report.html.j2"]),
    script:
        "../scripts/report.py"
