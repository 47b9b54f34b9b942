# A bundle of a variant's weights.
rule quantize_variant:
    input:
        unpack(choices),
        onnx="results/{model}/onnx",
        base="results/{model}/mnn/base",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/mnn/{variant}"),
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
        decoder=weights("decoder"),
        vision=weights("vision"),
        engine=engine,
        options=choice_options,
        fingerprint=stage_fingerprint("quantize"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn quantize {input.onnx:q} {input.base:q} --decoder {params.decoder:q} --vision {params.vision:q}"
        " --engine {params.engine:q} {params.options} --threads {threads} --out {output:q}"
