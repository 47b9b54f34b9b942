# The graphs, converted by MNN, every attention fused, proved. The linear layers have no weights yet.
rule convert_graphs:
    input:
        onnx="results/{model}/onnx",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/mnn/base"),
    log:
        "logs/convert_graphs/{model}.log",
    benchmark:
        "benchmarks/convert_graphs/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory("mnn"),
        runtime=runtime("mnn"),
    params:
        fingerprint=stage_fingerprint("mnn"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn mnn {input.onnx:q} --out {output:q}"
