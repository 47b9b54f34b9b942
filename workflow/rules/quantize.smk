# A variant of the float bundle, by MNN's own converter.
rule quantize_variant:
    input:
        onnx="results/{model}/onnx/manifest.json",
        float="results/{model}/mnn/float/manifest.json",
    output:
        "results/{model}/mnn/{variant}/config.json",
        "results/{model}/mnn/{variant}/llm_config.json",
        "results/{model}/mnn/{variant}/llm.mnn",
        "results/{model}/mnn/{variant}/llm.mnn.weight",
        "results/{model}/mnn/{variant}/visual.mnn",
        "results/{model}/mnn/{variant}/visual.mnn.weight",
        "results/{model}/mnn/{variant}/embeddings_bf16.bin",
        "results/{model}/mnn/{variant}/tokenizer.mtok",
        manifest="results/{model}/mnn/{variant}/manifest.json",
    log:
        "logs/quantize_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/quantize_variant/{model}/{variant}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory(500, 2.0),
        runtime="8h",
    params:
        onnx=subpath(input.onnx, parent=True),
        float=subpath(input.float, parent=True),
        decoder=weights("decoder"),
        vision=weights("vision"),
        engine=engine,
        out=subpath(output.manifest, parent=True),
        fingerprint=fingerprint("mnn"),
    shell:
        "hf2mnn quantize {params.onnx:q} {params.float:q} --decoder {params.decoder:q} --vision {params.vision:q}"
        " --engine {params.engine:q} --out {params.out:q}"
        " > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"
