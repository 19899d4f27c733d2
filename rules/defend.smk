# No test image and no trigger among the inputs: the graph of jobs is the proof that no defense peeks.
rule defend:
    input:
        **needs("defend"),
    output:
        **makes("defend"),
    log:
        log_of("defend"),
    group:
        group_of("defend")
    resources:
        mem_mb=memory("defend"),
        runtime=runtime("defend"),
        gpu=GPUS_A_JOB,
        tries_left=tries_left,
    params:
        settings=defense_settings,
        sources=defense_sources,
        code=code("defend"),
    script:
        "../scripts/defend.py"
