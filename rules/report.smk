import hashlib

REPORT_TEMPLATE = registry.PACKAGE / "analysis/report.html.j2"


rule aggregate:
    input:
        metrics=all_metrics,
        models=all_model_cards,
        poisoned=all_poison_cards,
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
        previews=all_previews,
    output:
        page=report("results/report/index.html", category="Report"),
        figure=report("results/report/effect.svg", category="Figures"),
    log:
        "logs/report.log",
    params:
        example=lambda wildcards: all_metrics(wildcards)[-1],
        code=code("report"),
        # The digest of code knows Python only.
        template=hashlib.sha256(REPORT_TEMPLATE.read_bytes()).hexdigest()[:16],
    script:
        "../scripts/report.py"
