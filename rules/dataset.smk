rule dataset:
    output:
        **makes("dataset"),
    log:
        log_of("dataset"),
    resources:
        mem_mb=memory("dataset"),
        runtime=runtime("dataset"),
    params:
        source=source,
        source_settings=lambda wildcards: study.datasets[wildcards.dataset].source_settings,
        augmentation=lambda wildcards: study.datasets[wildcards.dataset].augmentation.model_dump(),
        options=lambda wildcards: study.datasets[wildcards.dataset].options,
        code=code("dataset"),
    script:
        "../scripts/dataset.py"


rule sample:
    input:
        pool=graph.RULES["dataset"].pattern(study.pool),
    output:
        **makes("sample"),
    log:
        log_of("sample"),
    resources:
        mem_mb=memory("sample"),
        runtime=runtime("sample"),
    params:
        code=code("sample"),
    script:
        "../scripts/sample.py"
