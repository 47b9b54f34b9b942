# The float32 bundle and its runs, made once for the diagnoses of all variants.
rule run_baseline:
    """
    Input: the reference, the ONNX graphs, MNN's graphs
    Output: the bundle, as large as the model in float32, and its logits
    """
    input:
        reference="results/{model}/reference/evaluation",
        onnx="results/{model}/onnx",
        graphs="results/{model}/graphs",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/baseline"),
    log:
        "logs/run_baseline/{model}.log",
    benchmark:
        "benchmarks/run_baseline/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("baseline"),
        runtime=runtime("baseline"),
    params:
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("baseline"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn baseline --reference {input.reference:q}"
        " --onnx {input.onnx:q} --graphs {input.graphs:q} --time-limit {params.time_limit} --threads {threads} --out {output:q}"
