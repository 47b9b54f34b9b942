# The format of each operator that costs the answers least within a variant's budget.
rule plan_bits:
    """
    Input: sensitivities, the ONNX graphs, MNN's graphs
    Output: plan.yaml
    """
    input:
        sensitivity="results/{model}/sensitivity",
        onnx="results/{model}/onnx",
        graphs="results/{model}/graphs",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/plans/{variant}"),
    log:
        "logs/plan_bits/{model}/{variant}.log",
    benchmark:
        "benchmarks/plan_bits/{model}/{variant}.tsv"
    wildcard_constraints:
        variant=names(name for name, variant in CONFIG.variants.items() if variant.auto),
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory("plan"),
        runtime=runtime("plan"),
    params:
        budget=lookup("{variant}", within={name: variant.budget for name, variant in CONFIG.variants.items()}),
        embedding=lookup("{variant}", within={name: variant.embedding for name, variant in CONFIG.variants.items()}),
        fingerprint=stage_fingerprint("plan"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn plan {input.sensitivity:q} --onnx {input.onnx:q} --graphs {input.graphs:q}"
        " --budget {params.budget:q} --embedding {params.embedding:q} --out {output:q}"
