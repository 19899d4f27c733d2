rule aggregate:
    input:
        metrics=all_metrics,
        models=all_model_cards,
        poisoned=all_poisoned("card.json"),
    output:
        cells="results/tables/cells.parquet",
        models="results/tables/models.parquet",
        summary="results/tables/summary.parquet",
    log:
        "logs/aggregate.log",
    params:
        code=code("aggregate"),
    script:
        "../scripts/aggregate.py"


rule report:
    input:
        cells="results/tables/cells.parquet",
        models="results/tables/models.parquet",
        summary="results/tables/summary.parquet",
        previews=all_poisoned("preview.png"),
    output:
        page=report("results/report/index.html", category="Report"),
        figure=report("results/report/effect.svg", category="Figures"),
    log:
        "logs/report.log",
    params:
        example=lambda wildcards: metrics_files()[-1],
        code=code("report", beside=[registry.PACKAGE / "analysis/report.html.j2"]),
    script:
        "../scripts/report.py"
