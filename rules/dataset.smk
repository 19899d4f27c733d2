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
        # A function that takes outputs reruns nothing: where the images lie may change, what they are may not.
        source_settings=lambda wildcards, output: study.datasets[wildcards.dataset].source_settings,
        what=lambda wildcards: sources.what(study.datasets[wildcards.dataset]),
        images=images,
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
