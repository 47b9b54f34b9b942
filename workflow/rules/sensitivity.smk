# Divergence of the answers when one operator alone is quantized, for bits: auto.
rule measure_sensitivity:
    """
    Input: the checkpoint, and its answers to the calibration set
    Output: a table of measured divergences, and one of candidate formats
    """
    input:
        checkpoint="results/{model}/checkpoint",
        calibration="results/{model}/reference/calibration",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/sensitivity"),
    log:
        "logs/measure_sensitivity/{model}.log",
    benchmark:
        "benchmarks/measure_sensitivity/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("sensitivity"),
        runtime=runtime("sensitivity"),
    params:
        bits=[f"--bits={bits}" for bits in CONFIG.calibration.bits],
        examples=CONFIG.calibration.examples,
        fingerprint=stage_fingerprint("sensitivity"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn sensitivity {input.checkpoint:q}"
        " --calibration {input.calibration:q} {params.bits:q} --examples {params.examples:q}"
        " --threads {threads} --out {output:q}"
