rule aggregate:
    input:
        **needs("aggregate"),
    output:
        **makes("aggregate"),
    log:
        log_of("aggregate"),
    resources:
        mem_mb=memory("aggregate"),
        runtime=runtime("aggregate", thousand_shards),
    params:
        gate=study.gate.model_dump(),
        given_up=given_up_cells,
        # Without what changes no number.
        study=study_text(),
        code=code("aggregate"),
    script:
        "../scripts/aggregate.py"


rule report:
    input:
        **needs("report"),
    output:
        **makes("report"),
    log:
        log_of("report"),
    resources:
        mem_mb=memory("report"),
        runtime=runtime("report", thousand_shards),
    params:
        datasets=study.grid.datasets,
        gate=study.gate.model_dump(),
        draws=[str(draws) for draws in study.grid.draws],
        triggers=triggers_shown,
        code=code("report"),
    script:
        "../scripts/report.py"
