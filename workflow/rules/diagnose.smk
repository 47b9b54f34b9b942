# The causes of a variant's error, layer by layer and source by source.
rule diagnose_variant:
    """
    Input: the reference, the ONNX graphs, the baseline, the bundle
    Output: a table of layers, an error budget, findings
    """
    input:
        reference="results/{model}/reference/evaluation",
        onnx="results/{model}/onnx",
        baseline="results/{model}/baseline",
        bundle="results/{model}/bundles/{variant}",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/diagnosis/{variant}"),
    log:
        "logs/diagnose_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/diagnose_variant/{model}/{variant}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("diagnose"),
        runtime=runtime("diagnose"),
    params:
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("diagnose"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn diagnose --reference {input.reference:q}"
        " --onnx {input.onnx:q} --baseline {input.baseline:q} --bundle {input.bundle:q}"
        " --time-limit {params.time_limit} --threads {threads} --out {output:q}"
