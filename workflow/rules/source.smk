# A checkpoint, from a folder or the hub, checked and vouched for.
rule fetch_source:
    input:
        source_files,
    output:
        "results/{model}/source/manifest.json",
    log:
        "logs/fetch_source/{model}.log",
    benchmark:
        "benchmarks/fetch_source/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="4h",
    params:
        options=source_options,
        out=subpath(output[0], parent=True),
        fingerprint=fingerprint("source"),
    shell:
        "hf2mnn source {params.options} --out {params.out:q} > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"
