rule evaluate:
    input:
        **needs("evaluate"),
    output:
        **makes("evaluate"),
    group:
        group_of("evaluate")
    resources:
        mem_mb=memory("evaluate"),
        runtime=runtime("evaluate"),
        gpu=GPUS_A_JOB,
    params:
        code=code("evaluate"),
        # No log of the rule: see the graph.
        log=log_of("evaluate"),
    script:
        "../scripts/evaluate.py"


rule evaluate_untouched:
    input:
        **needs("evaluate_untouched"),
    output:
        **makes("evaluate_untouched"),
    log:
        log_of("evaluate_untouched"),
    resources:
        mem_mb=memory("evaluate_untouched"),
        runtime=runtime("evaluate_untouched"),
        gpu=GPUS_A_JOB,
    params:
        code=code("evaluate_untouched"),
    script:
        "../scripts/evaluate_untouched.py"


rule check_trigger:
    input:
        **needs("check_trigger"),
    output:
        **makes("check_trigger"),
    log:
        log_of("check_trigger"),
    wildcard_constraints:
        attack=attacks_of("check_trigger"),
    resources:
        mem_mb=memory("evaluate_untouched"),
        runtime=runtime("evaluate_untouched"),
        gpu=GPUS_A_JOB,
    params:
        settings=attack_settings,
        code=code("check_trigger"),
    script:
        "../scripts/check_trigger.py"
