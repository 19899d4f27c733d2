# Each stage twice: once for triggers that all models share, once for those of an architecture or a model.
rule trigger:
    input:
        **needs("trigger"),
    output:
        **makes("trigger"),
    log:
        log_of("trigger"),
    wildcard_constraints:
        attack=attacks_of("trigger"),
    resources:
        mem_mb=memory("trigger"),
        runtime=runtime("trigger"),
        gpu=GPUS_A_JOB,
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("trigger"),
    script:
        "../scripts/trigger.py"


use rule trigger as trigger_against_model with:
    input:
        **needs("trigger_against_model"),
    output:
        **makes("trigger_against_model"),
    log:
        log_of("trigger_against_model"),
    wildcard_constraints:
        attack=attacks_of("trigger_against_model"),


rule poison:
    input:
        **needs("poison"),
    output:
        **makes("poison"),
    log:
        log_of("poison"),
    wildcard_constraints:
        attack=attacks_of("poison"),
    resources:
        mem_mb=memory("poison"),
        runtime=runtime("poison"),
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("poison"),
    script:
        "../scripts/poison.py"


use rule poison as poison_own with:
    input:
        **needs("poison_own"),
    output:
        **makes("poison_own"),
    log:
        log_of("poison_own"),
    wildcard_constraints:
        attack=attacks_of("poison_own"),


rule triggered:
    input:
        **needs("triggered"),
    output:
        **makes("triggered"),
    log:
        log_of("triggered"),
    wildcard_constraints:
        attack=attacks_of("triggered"),
    resources:
        mem_mb=memory("triggered"),
        runtime=runtime("triggered"),
    params:
        labels=study.labels,
        settings=attack_settings,
        code=code("triggered"),
    script:
        "../scripts/triggered.py"


use rule triggered as triggered_own with:
    input:
        **needs("triggered_own"),
    output:
        **makes("triggered_own"),
    log:
        log_of("triggered_own"),
    wildcard_constraints:
        attack=attacks_of("triggered_own"),


rule stamp:
    input:
        **needs("stamp"),
    output:
        **makes("stamp"),
    log:
        log_of("stamp"),
    wildcard_constraints:
        attack=attacks_of("stamp"),
    resources:
        mem_mb=memory("stamp"),
        runtime=runtime("stamp"),
    params:
        settings=attack_settings,
        code=code("stamp"),
    script:
        "../scripts/stamp.py"


use rule stamp as stamp_own with:
    input:
        **needs("stamp_own"),
    output:
        **makes("stamp_own"),
    log:
        log_of("stamp_own"),
    wildcard_constraints:
        attack=attacks_of("stamp_own"),
