# The float bundle: converted by MNN, every attention fused, proved.
rule convert_float:
    input:
        "results/{model}/onnx/manifest.json",
    output:
        "results/{model}/mnn/float/config.json",
        "results/{model}/mnn/float/llm_config.json",
        "results/{model}/mnn/float/llm.mnn",
        "results/{model}/mnn/float/llm.mnn.weight",
        "results/{model}/mnn/float/visual.mnn",
        "results/{model}/mnn/float/visual.mnn.weight",
        "results/{model}/mnn/float/embeddings_bf16.bin",
        "results/{model}/mnn/float/tokenizer.mtok",
        manifest="results/{model}/mnn/float/manifest.json",
    log:
        "logs/convert_float/{model}.log",
    benchmark:
        "benchmarks/convert_float/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory(500, 2.0),
        runtime="4h",
    params:
        onnx=subpath(input[0], parent=True),
        out=subpath(output.manifest, parent=True),
        fingerprint=fingerprint("mnn"),
    shell:
        "hf2mnn mnn {params.onnx:q} --out {params.out:q}" " > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"
