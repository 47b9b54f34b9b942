# Inputs of every linear layer on the calibration set, for awq and gptq.
rule record_calibration:
    """
    Input: the checkpoint, and its answers to the calibration and the evaluation set
    Output: sampled rows of the inputs of each layer
    """
    input:
        checkpoint="results/{model}/checkpoint",
        calibration="results/{model}/reference/calibration",
        evaluation="results/{model}/reference/evaluation",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/calibration"),
    log:
        "logs/record_calibration/{model}.log",
    benchmark:
        "benchmarks/record_calibration/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("calibrate"),
        runtime=runtime("calibrate"),
    params:
        rows=CONFIG.calibration.rows,
        fingerprint=stage_fingerprint("calibrate"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn calibrate {input.checkpoint:q}"
        " --calibration {input.calibration:q} --evaluation {input.evaluation:q} --rows {params.rows:q}"
        " --threads {threads} --out {output:q}"
