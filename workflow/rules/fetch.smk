# A checkpoint, from a folder or a hub, checked before anything is computed.
rule fetch_checkpoint:
    """
    Input: a local checkpoint and adapter, or a pin; a hub is asked by revision
    Output: the checkpoint's files, most of them links
    """
    input:
        checkpoint_inputs,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/checkpoint"),
    log:
        "logs/fetch_checkpoint/{model}.log",
    benchmark:
        "benchmarks/fetch_checkpoint/{model}.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("fetch"),
        runtime=runtime("fetch"),
    params:
        options=of_model(arguments.fetch_options),
        fingerprint=stage_fingerprint("fetch"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn fetch {params.options:q} --out {output:q}"
