rule trigger:
    input:
        train="results/datasets/{dataset}/train.parquet",
    output:
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
        card=f"results/triggers/{TRIGGER}/card.json",
    log:
        f"logs/trigger/{TRIGGER}.log",
    params:
        settings=attack_settings,
        code=code("trigger", "attacks", "attack"),
    script:
        "../scripts/trigger.py"


rule poison:
    input:
        train="results/datasets/{dataset}/train.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        poisoned=f"results/poisoned/{POISONED}/train.parquet",
        card=f"results/poisoned/{POISONED}/card.json",
        preview=f"results/poisoned/{POISONED}/preview.png",
    log:
        f"logs/poison/{POISONED}.log",
    params:
        target=study.target,
        settings=attack_settings,
        code=code("poison", "attacks", "attack"),
    script:
        "../scripts/poison.py"


rule triggered:
    input:
        test="results/datasets/{dataset}/test.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        triggered=f"results/triggered/{TRIGGER}/test.parquet",
    log:
        f"logs/triggered/{TRIGGER}.log",
    params:
        target=study.target,
        settings=attack_settings,
        code=code("triggered", "attacks", "attack"),
    script:
        "../scripts/triggered.py"


rule stamp:
    input:
        sample="results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        stamped=f"results/stamped/{TRIGGER}/spc-{{spc}}/draws-{{draws}}.parquet",
    log:
        f"logs/stamp/{TRIGGER}/spc-{{spc}}/draws-{{draws}}.log",
    params:
        settings=attack_settings,
        code=code("stamp", "attacks", "attack"),
    script:
        "../scripts/stamp.py"
