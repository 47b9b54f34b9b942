# The answers of one conversion, in the runtime that runs it, against the reference.
rule evaluate_variant:
    """
    Input: the reference, the ONNX graphs, and the bundle; "onnxruntime" is the graphs themselves
    Output: tables of positions, answers, images and cache parity, figures, a summary
    """
    input:
        bundle=bundle_of,
        reference="results/{model}/reference/evaluation",
        onnx="results/{model}/onnx",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/evaluation/{variant}"),
    log:
        "logs/evaluate_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/evaluate_variant/{model}/{variant}.tsv"
    wildcard_constraints:
        variant=names(["onnxruntime", *CONFIG.variants]),
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("evaluate"),
        runtime=runtime("evaluate"),
    params:
        bundle=bundle_option,
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("evaluate"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluate --reference {input.reference:q}"
        " --onnx {input.onnx:q} {params.bundle:q} --time-limit {params.time_limit} --threads {threads} --out {output:q}"
