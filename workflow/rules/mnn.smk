# The graphs, converted by MNN, every attention fused, proved. The linear layers have no weights yet.
rule convert_graphs:
    input:
        "results/{model}/onnx/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/mnn/base/llm.mnn",
        "results/{model}/mnn/base/llm.mnn.weight",
        "results/{model}/mnn/base/embeddings_bf16.bin",
        "results/{model}/mnn/base/tokenizer.mtok",
        manifest="results/{model}/mnn/base/manifest.json",
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
        onnx=subpath(input[0], parent=True),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("mnn"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn mnn {params.onnx:q} --out {params.out:q}"
