# The questions that a model is evaluated or calibrated on.
rule collect_examples:
    """
    Input: a user-provided set; a labelled data set is drawn from its hub or a local copy
    Output: examples.jsonl and its images
    """
    input:
        example_inputs,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/examples/{set}"),
    log:
        "logs/collect_examples/{model}/{set}.log",
    benchmark:
        "benchmarks/collect_examples/{model}/{set}.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("examples"),
        runtime=runtime("examples"),
    params:
        options=of_model(arguments.example_options),
        fingerprint=stage_fingerprint("examples"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn examples {params.options:q} --out {output:q}"
