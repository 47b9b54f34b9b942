# What calibrated methods and mixed precision go by: PyTorch on examples that the evaluation never sees.
rule answer_calibration:
    input:
        source="results/{model}/source",
        calibration="results/{model}/examples/calibration",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/calibration"),
    log:
        "logs/answer_calibration/{model}.log",
    benchmark:
        "benchmarks/answer_calibration/{model}.tsv"
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
        " {input.source:q} --evaluation {input.calibration:q} --max-new-tokens {params.max_new_tokens}"
        " --threads {threads} --out {output:q}"


# For awq and gptq: what each linear layer reads.
rule record_activations:
    input:
        source="results/{model}/source",
        calibration="results/{model}/calibration",
        evaluation="results/{model}/reference",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/activations"),
    log:
        "logs/record_activations/{model}.log",
    benchmark:
        "benchmarks/record_activations/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("activations"),
        runtime=runtime("activations"),
    params:
        rows=CONFIG.calibration.rows,
        fingerprint=stage_fingerprint("activations"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn activations {input.source:q} --calibration {input.calibration:q} --evaluation {input.evaluation:q}"
        " --rows {params.rows:q} --threads {threads} --out {output:q}"


# For bits: auto: what it costs the answers when one operator is quantized.
rule measure_sensitivity:
    input:
        source="results/{model}/source",
        calibration="results/{model}/calibration",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/sensitivity"),
    log:
        "logs/measure_sensitivity/{model}.log",
    benchmark:
        "benchmarks/measure_sensitivity/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("sensitivity"),
        runtime=runtime("sensitivity"),
    params:
        options=shlex.join(f"--bits={bits}" for bits in CONFIG.calibration.bits),
        examples=CONFIG.calibration.examples,
        fingerprint=stage_fingerprint("sensitivity"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn sensitivity {input.source:q} --calibration {input.calibration:q} {params.options}"
        " --examples {params.examples:q} --threads {threads} --out {output:q}"


rule choose_plan:
    input:
        sensitivity="results/{model}/sensitivity",
        onnx="results/{model}/onnx",
        base="results/{model}/mnn/base",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/plans/{variant}"),
    log:
        "logs/choose_plan/{model}/{variant}.log",
    benchmark:
        "benchmarks/choose_plan/{model}/{variant}.tsv"
    wildcard_constraints:
        variant=names(name for name, variant in CONFIG.variants.items() if variant.auto),
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=memory("plan"),
        runtime=runtime("plan"),
    params:
        budget=lookup("{variant}", within={v: c.budget for v, c in CONFIG.variants.items()}),
        embedding=lookup("{variant}", within={v: c.embedding for v, c in CONFIG.variants.items()}),
        fingerprint=stage_fingerprint("plan"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn plan {input.sensitivity:q} --onnx {input.onnx:q} --base {input.base:q} --budget {params.budget:q}"
        " --embedding {params.embedding:q} --out {output:q}"
