# Speed and memory of a model's bundles. Takes all cores, so that no other job runs beside it.
rule benchmark_variants:
    """
    Input: the bundles
    Output: a row for each run and measure, medians and ratios, the gain of the KV cache
    """
    input:
        bundles=bundles,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/benchmark"),
    log:
        "logs/benchmark_variants/{model}.log",
    benchmark:
        "benchmarks/benchmark_variants/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CORES or CONFIG.benchmark.threads or CONFIG.threads
    resources:
        mem_mb=memory("benchmark"),
        runtime=runtime("benchmark"),
    params:
        options=of_config(arguments.benchmark_options),
        bundles=bundle_options,
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("benchmark"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn benchmark {params.bundles:q} {params.options:q}"
        f" --threads {CONFIG.benchmark.threads or '{threads}'}"
        " --time-limit {params.time_limit} --out {output:q}"
