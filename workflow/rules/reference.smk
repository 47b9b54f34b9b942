# The answers of transformers' model in float32, once for all comparisons.
rule run_reference:
    """
    Input: the checkpoint and a set of examples
    Output: prompts, answers, logits, image embeddings, tap points
    """
    input:
        checkpoint="results/{model}/checkpoint",
        examples="results/{model}/examples/{set}",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/reference/{set}"),
    log:
        "logs/run_reference/{model}/{set}.log",
    benchmark:
        "benchmarks/run_reference/{model}/{set}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("reference"),
        runtime=runtime("reference"),
    params:
        max_new_tokens=lookup("{model}", within={name: model.max_new_tokens for name, model in CONFIG.models.items()}),
        fingerprint=stage_fingerprint("reference"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn reference {input.checkpoint:q}"
        " --examples {input.examples:q} --max-new-tokens {params.max_new_tokens} --threads {threads} --out {output:q}"
