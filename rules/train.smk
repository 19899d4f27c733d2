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
    params:
        architecture=architecture_settings,
        optimization=training_settings,
        code=code("train", "models", "architecture"),
    script:
        "../scripts/train.py"
