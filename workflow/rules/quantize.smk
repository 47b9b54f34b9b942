# A bundle of a variant's weights. Its embedding may have no file of its own, and there may be no vision tower, so neither
# is named here; the manifest names all there is.
rule quantize_variant:
    input:
        unpack(choices),
        onnx="results/{model}/onnx/manifest.json",
        base="results/{model}/mnn/base/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/mnn/{variant}/config.json",
        "results/{model}/mnn/{variant}/llm_config.json",
        "results/{model}/mnn/{variant}/llm.mnn",
        "results/{model}/mnn/{variant}/llm.mnn.weight",
        "results/{model}/mnn/{variant}/tokenizer.mtok",
        manifest="results/{model}/mnn/{variant}/manifest.json",
    log:
        "logs/quantize_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/quantize_variant/{model}/{variant}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("quantize"),
        runtime=runtime("quantize"),
    params:
        onnx=subpath(input.onnx, parent=True),
        base=subpath(input.base, parent=True),
        decoder=weights("decoder"),
        vision=weights("vision"),
        engine=engine,
        options=choice_options,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("quantize"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn quantize {params.onnx:q} {params.base:q} --decoder {params.decoder:q} --vision {params.vision:q}"
        " --engine {params.engine:q} {params.options} --threads {threads} --out {params.out:q}"
