# A bundle: MNN's graphs with the checkpoint's weights in the variant's formats.
rule quantize_variant:
    """
    Input: the ONNX graphs, MNN's graphs, and what the variant's methods need
    Output: the bundle, with a table of its operators
    """
    input:
        unpack(quantize_inputs),
        onnx="results/{model}/onnx",
        graphs="results/{model}/graphs",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/bundles/{variant}"),
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
        formats=of_config(arguments.format_options),
        folders=method_options,
        fingerprint=stage_fingerprint("quantize"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn quantize {input.onnx:q} {input.graphs:q} {params.formats:q} {params.folders:q}"
        " --threads {threads} --out {output:q}"
