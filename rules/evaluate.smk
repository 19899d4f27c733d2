rule evaluate:
    input:
        weights=f"results/defended/{SHARD}/weights",
        runs=f"results/defended/{SHARD}/runs.parquet",
        test="results/datasets/{dataset}/test.parquet",
        triggered=triggered_test,
    output:
        metrics=f"results/metrics/{SHARD}/metrics.parquet",
        predictions=f"results/metrics/{SHARD}/predictions.parquet",
    log:
        f"logs/evaluate/{SHARD}.log",
    params:
        code=code("evaluate"),
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
        f"logs/evaluate/{UNTOUCHED}.log",
    params:
        code=code("evaluate_untouched"),
    script:
        "../scripts/evaluate_untouched.py"
