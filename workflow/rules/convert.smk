# The ONNX graphs as MNN's, every attention fused; the linear layers have no weights yet.
rule convert_graphs:
    """
    Input: the ONNX graphs
    Output: MNN's graphs, embedding, tokenizer
    """
    input:
        onnx="results/{model}/onnx",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/graphs"),
    log:
        "logs/convert_graphs/{model}.log",
    benchmark:
        "benchmarks/convert_graphs/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory("convert"),
        runtime=runtime("convert"),
    params:
        fingerprint=stage_fingerprint("convert"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn convert {input.onnx:q} --out {output:q}"
