# Each stage twice: once for triggers that all models share, once for those of an architecture or a model.
rule trigger:
    input:
        train="results/datasets/{dataset}/train.parquet",
    output:
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
        card=f"results/triggers/{TRIGGER}/card.json",
    log:
        f"logs/trigger/{TRIGGER}.log",
    wildcard_constraints:
        attack=attacks_of("all", "model"),
    resources:
        mem_mb=memory("trigger"),
        runtime=runtime("trigger"),
        gpu=GPUS_A_JOB,
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("trigger", attacks="attack"),
    script:
        "../scripts/trigger.py"


use rule trigger as trigger_against_model with:
    input:
        train="results/datasets/{dataset}/train.parquet",
        model=f"results/models/{CLEAN_MODEL}/model.safetensors",
    output:
        trigger=f"results/triggers/{OWN_TRIGGER}/trigger.safetensors",
        card=f"results/triggers/{OWN_TRIGGER}/card.json",
    log:
        f"logs/trigger/{OWN_TRIGGER}.log",
    wildcard_constraints:
        attack=attacks_of("architecture"),


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
    wildcard_constraints:
        attack=attacks_of("all"),
    resources:
        mem_mb=memory("poison"),
        runtime=runtime("poison"),
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("poison", attacks="attack"),
    script:
        "../scripts/poison.py"


use rule poison as poison_own with:
    input:
        train="results/datasets/{dataset}/train.parquet",
        trigger=own_trigger,
    output:
        poisoned=f"results/poisoned/{MODEL}/train.parquet",
        card=f"results/poisoned/{MODEL}/card.json",
        preview=f"results/poisoned/{MODEL}/preview.png",
    log:
        f"logs/poison/{MODEL}.log",
    wildcard_constraints:
        attack=attacks_of("architecture"),


rule triggered:
    input:
        test="results/datasets/{dataset}/test.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        triggered=f"results/triggered/{TRIGGER}/test.parquet",
        examples=f"results/triggered/{TRIGGER}/examples.parquet",
        card=f"results/triggered/{TRIGGER}/card.json",
    log:
        f"logs/triggered/{TRIGGER}.log",
    wildcard_constraints:
        attack=attacks_of("all"),
    resources:
        mem_mb=memory("triggered"),
        runtime=runtime("triggered"),
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("triggered", attacks="attack"),
    script:
        "../scripts/triggered.py"


use rule triggered as triggered_own with:
    input:
        test="results/datasets/{dataset}/test.parquet",
        trigger=own_trigger,
    output:
        triggered=f"results/triggered/{MODEL}/test.parquet",
        examples=f"results/triggered/{MODEL}/examples.parquet",
        card=f"results/triggered/{MODEL}/card.json",
    log:
        f"logs/triggered/{MODEL}.log",
    wildcard_constraints:
        attack=attacks_of("architecture", "model"),


rule stamp:
    input:
        sample="results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet",
        trigger=f"results/triggers/{TRIGGER}/trigger.safetensors",
    output:
        stamped=f"results/stamped/{TRIGGER}/spc-{{spc}}/draws-{{draws}}.parquet",
    log:
        f"logs/stamp/{TRIGGER}/spc-{{spc}}/draws-{{draws}}.log",
    wildcard_constraints:
        attack=attacks_of("all"),
    resources:
        mem_mb=memory("stamp"),
        runtime=runtime("stamp"),
    params:
        settings=attack_settings,
        code=code("stamp", attacks="attack"),
    script:
        "../scripts/stamp.py"


use rule stamp as stamp_own with:
    input:
        sample="results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet",
        trigger=own_trigger,
    output:
        stamped=f"results/stamped/{MODEL}/spc-{{spc}}/draws-{{draws}}.parquet",
    log:
        f"logs/stamp/{MODEL}/spc-{{spc}}/draws-{{draws}}.log",
    wildcard_constraints:
        attack=attacks_of("architecture", "model"),
