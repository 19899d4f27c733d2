# No test image and no trigger among the inputs: the graph of jobs is the proof that no defense peeks.
rule defend:
    input:
        model=f"results/models/{MODEL}/model.safetensors",
        sample=defender_sample,
        triggered_sample=defender_triggered_sample,
    output:
        weights=temporary_unless_kept(directory(f"results/defended/{SHARD}/weights")),
        runs=f"results/defended/{SHARD}/runs.parquet",
    log:
        f"logs/defend/{SHARD}.log",
    params:
        settings=defense_settings,
        code=code("defend", defenses="defense"),
    script:
        "../scripts/defend.py"
