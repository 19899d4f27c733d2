rule train:
    input:
        **needs("train"),
    output:
        **makes("train"),
    log:
        log_of("train"),
    wildcard_constraints:
        attack=attacks_of("train"),
    resources:
        mem_mb=memory("train"),
        runtime=runtime("train", epochs),
        gpu=GPUS_A_JOB,
    params:
        architecture=architecture_settings,
        optimization=training_settings,
        code=code("train"),
    script:
        "../scripts/train.py"


# The attack composes every batch; the trigger lies beside the model, as training has left it.
rule train_controlled:
    input:
        **needs("train_controlled"),
    output:
        **makes("train_controlled"),
    log:
        log_of("train_controlled"),
    wildcard_constraints:
        attack=attacks_of("train_controlled"),
    resources:
        mem_mb=memory("train"),
        runtime=runtime("train", epochs),
        gpu=GPUS_A_JOB,
    params:
        attack=attack_settings,
        labels=study.labels,
        architecture=architecture_settings,
        optimization=training_settings,
        code=code("train_controlled"),
    script:
        "../scripts/train_controlled.py"
