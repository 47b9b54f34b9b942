# PyTorch's own answers in float32, once per model.
rule answer_reference:
    input:
        source="results/{model}/source/manifest.json",
        evaluation=evaluation_files,
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
        mem_mb=memory(1500, 2.5),
        runtime="8h",
    params:
        source=subpath(input.source, parent=True),
        evaluation=lookup("{model}", within={m: v.evaluation for m, v in CONFIG.models.items()}),
        max_new_tokens=lookup("{model}", within={m: v.max_new_tokens for m, v in CONFIG.models.items()}),
        out=subpath(output.manifest, parent=True),
        fingerprint=fingerprint("reference"),
    shell:
        "hf2mnn reference {params.source:q} --evaluation {params.evaluation:q} --max-new-tokens {params.max_new_tokens}"
        " --threads {threads} --out {params.out:q}"
        " > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"
