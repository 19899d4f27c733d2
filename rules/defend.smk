# No test image and no trigger among the inputs: the graph of jobs is the proof that no defense peeks.
rule defend:
    input:
        model=f"results/models/{MODEL}/model.safetensors",
        sample=defender_sample,
        triggered_sample=defender_triggered_sample,
    output:
        defended=temporary_unless_kept(directory(f"results/defended/{SHARD}")),
    log:
        f"logs/shards/{SHARD}.log",
    resources:
        mem_mb=memory("defend"),
        runtime=runtime("defend"),
        gpu=GPUS_A_JOB,
    params:
        settings=defense_settings,
        code=code("defend", defenses="defense"),
    script:
        "../scripts/defend.py"
