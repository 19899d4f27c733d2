rule dataset:
    output:
        train="results/datasets/{dataset}/train.parquet",
        held_out="results/datasets/{dataset}/held_out.parquet",
        test="results/datasets/{dataset}/test.parquet",
    log:
        "logs/dataset/{dataset}.log",
    resources:
        mem_mb=memory("dataset"),
        runtime=runtime("dataset"),
    params:
        source=lambda wildcards: study.datasets[wildcards.dataset].source,
        source_settings=lambda wildcards: study.datasets[wildcards.dataset].source_settings,
        augmentation=lambda wildcards: study.datasets[wildcards.dataset].augmentation.model_dump(),
        options=lambda wildcards: study.datasets[wildcards.dataset].options,
        code=dataset_code,
    script:
        "../scripts/dataset.py"


rule sample:
    input:
        pool=defender_pool,
    output:
        sample="results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet",
    log:
        "logs/sample/{dataset}/spc-{spc}/draws-{draws}.log",
    resources:
        mem_mb=memory("sample"),
        runtime=runtime("sample"),
    params:
        code=code("sample"),
    script:
        "../scripts/sample.py"
