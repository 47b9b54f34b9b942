# What a model is asked: a person's own set, or questions drawn of a labelled data set. These rules read what lies where
# Snakemake is started; what follows reads their folders only.
rule take_examples:
    input:
        own_examples,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/examples/{role}"),
    log:
        "logs/take_examples/{model}/{role}.log",
    benchmark:
        "benchmarks/take_examples/{model}/{role}.tsv"
    wildcard_constraints:
        role="evaluation|calibration",
    retries: 0
    localrule: True
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="1h",
    params:
        examples=examples_folder,
        fingerprint=stage_fingerprint("examples"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluation --examples {params.examples:q} --out {output:q}"


rule fetch_examples:
    input:
        labelled_files,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/examples/evaluation"),
    log:
        "logs/fetch_examples/{model}.log",
    benchmark:
        "benchmarks/fetch_examples/{model}.tsv"
    wildcard_constraints:
        model=names(model for model in CONFIG.models if labelled(model)),
    retries: 0
    localrule: True
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime="4h",
    params:
        options=labelled_options,
        fingerprint=stage_fingerprint("evaluation"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluation {params.options} --out {output:q}"


# For the models that fetch_examples is for, the other would do as well.
ruleorder: fetch_examples > take_examples


# PyTorch's own answers in float32, once per model.
rule answer_reference:
    input:
        source="results/{model}/source",
        evaluation="results/{model}/examples/evaluation",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/reference"),
    log:
        "logs/answer_reference/{model}.log",
    benchmark:
        "benchmarks/answer_reference/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("reference"),
        runtime=runtime("reference"),
    params:
        max_new_tokens=lookup("{model}", within={m: v.max_new_tokens for m, v in CONFIG.models.items()}),
        fingerprint=stage_fingerprint("reference"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn reference"
        " {input.source:q} --evaluation {input.evaluation:q} --max-new-tokens {params.max_new_tokens}"
        " --threads {threads} --out {output:q}"
