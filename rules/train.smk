rule train:
    input:
        train="results/datasets/{dataset}/train.parquet",
        poisoned=poisoned_rows,
    output:
        model=f"results/models/{MODEL}/model.safetensors",
        history=f"results/models/{MODEL}/history.parquet",
        card=f"results/models/{MODEL}/card.json",
    log:
        f"logs/train/{MODEL}.log",
    wildcard_constraints:
        attack=f"{cells.NO_METHOD}|{attacks_of('all', 'architecture')}",
    resources:
        mem_mb=memory("train"),
        runtime=runtime("train", epochs),
        gpu=GPUS_A_JOB,
    params:
        architecture=architecture_settings,
        optimization=training_settings,
        code=code("train", models="architecture"),
    script:
        "../scripts/train.py"


# The attack composes every batch; the trigger lies beside the model, as training has left it.
rule train_controlled:
    input:
        train="results/datasets/{dataset}/train.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        model=f"results/models/{MODEL}/model.safetensors",
        trigger=f"results/models/{MODEL}/trigger.safetensors",
        history=f"results/models/{MODEL}/history.parquet",
        card=f"results/models/{MODEL}/card.json",
    log:
        f"logs/train/{MODEL}.log",
    wildcard_constraints:
        attack=attacks_of("model"),
    resources:
        mem_mb=memory("train"),
        runtime=runtime("train", epochs),
        gpu=GPUS_A_JOB,
    params:
        attack=attack_settings,
        labels=study.labels,
        architecture=architecture_settings,
        optimization=training_settings,
        code=code("train_controlled", models="architecture", attacks="attack"),
    script:
        "../scripts/train_controlled.py"
