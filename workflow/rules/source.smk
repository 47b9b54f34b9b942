# A checkpoint, from a folder or the hub, checked and vouched for.
rule fetch_source:
    input:
        source_files,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/source"),
    log:
        "logs/fetch_source/{model}.log",
    benchmark:
        "benchmarks/fetch_source/{model}.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("source"),
        runtime=runtime("source"),
    params:
        options=source_options,
        fingerprint=stage_fingerprint("source"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn source {params.options} --out {output:q}"
