# Questions of a labelled data set, for models whose config.yaml names one.
rule fetch_evaluation:
    input:
        labelled_files,
        toolchain=toolchain_files,
    output:
        manifest="results/{model}/evaluation/manifest.json",
    log:
        "logs/fetch_evaluation/{model}.log",
    benchmark:
        "benchmarks/fetch_evaluation/{model}.tsv"
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
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("evaluation"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluation {params.options} --out {params.out:q}"


# PyTorch's own answers in float32, once per model.
rule answer_reference:
    input:
        source="results/{model}/source/manifest.json",
        evaluation=evaluation_files,
        toolchain=toolchain_files,
    output:
        "results/{model}/reference/examples.json",
        "results/{model}/reference/golden.safetensors",
        manifest="results/{model}/reference/manifest.json",
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
        source=subpath(input.source, parent=True),
        evaluation=evaluation_folder,
        max_new_tokens=lookup("{model}", within={m: v.max_new_tokens for m, v in CONFIG.models.items()}),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("reference"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn reference"
        " {params.source:q} --evaluation {params.evaluation:q} --max-new-tokens {params.max_new_tokens}"
        " --threads {threads} --out {params.out:q}"
