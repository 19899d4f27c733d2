rule evaluate:
    input:
        defended=f"results/defended/{SHARD}",
        test="results/datasets/{dataset}/test.parquet",
        triggered=triggered_test,
    output:
        metrics=f"results/metrics/{SHARD}/metrics.parquet",
        predictions=f"results/metrics/{SHARD}/predictions.parquet",
    resources:
        mem_mb=memory("evaluate"),
        runtime=runtime("evaluate"),
        gpu=GPUS_A_JOB,
    params:
        code=code("evaluate"),
        # Adds to what defend has written. Were it a log of the rule, Snakemake would delete it first.
        log=f"logs/shards/{SHARD}.log",
    script:
        "../scripts/evaluate.py"


rule evaluate_untouched:
    input:
        model=f"results/models/{MODEL}/model.safetensors",
        test="results/datasets/{dataset}/test.parquet",
        triggered=triggered_test,
    output:
        metrics=f"results/metrics/{UNTOUCHED}/metrics.parquet",
        predictions=f"results/metrics/{UNTOUCHED}/predictions.parquet",
    log:
        f"logs/shards/{UNTOUCHED}.log",
    resources:
        mem_mb=memory("evaluate_untouched"),
        runtime=runtime("evaluate_untouched"),
        gpu=GPUS_A_JOB,
    params:
        code=code("evaluate_untouched"),
    script:
        "../scripts/evaluate_untouched.py"
