# What calibrated methods and mixed precision go by: PyTorch on examples that the evaluation never sees.
rule answer_calibration:
    input:
        source="results/{model}/source/manifest.json",
        calibration=calibration_files,
        toolchain=toolchain_files,
    output:
        "results/{model}/calibration/examples.json",
        "results/{model}/calibration/golden.safetensors",
        manifest="results/{model}/calibration/manifest.json",
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
        source=subpath(input.source, parent=True),
        calibration=lookup("{model}", within={m: v.calibration for m, v in CONFIG.models.items()}),
        max_new_tokens=lookup("{model}", within={m: v.max_new_tokens for m, v in CONFIG.models.items()}),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("reference"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn reference"
        " {params.source:q} --evaluation {params.calibration:q} --max-new-tokens {params.max_new_tokens}"
        " --threads {threads} --out {params.out:q}"


# For awq and gptq: what each linear layer reads.
rule record_activations:
    input:
        source="results/{model}/source/manifest.json",
        calibration="results/{model}/calibration/manifest.json",
        evaluation="results/{model}/reference/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/activations/activations.safetensors",
        manifest="results/{model}/activations/manifest.json",
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
        source=subpath(input.source, parent=True),
        calibration=subpath(input.calibration, parent=True),
        evaluation=subpath(input.evaluation, parent=True),
        rows=CONFIG.calibration.rows,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("activations"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn activations {params.source:q} --calibration {params.calibration:q} --evaluation {params.evaluation:q}"
        " --rows {params.rows:q} --threads {threads} --out {params.out:q}"


# For bits: auto: what it costs the answers when one operator is quantized.
rule measure_sensitivity:
    input:
        source="results/{model}/source/manifest.json",
        calibration="results/{model}/calibration/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/sensitivity/measured.csv",
        "results/{model}/sensitivity/candidates.csv",
        manifest="results/{model}/sensitivity/manifest.json",
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
        source=subpath(input.source, parent=True),
        calibration=subpath(input.calibration, parent=True),
        options=shlex.join(f"--bits={bits}" for bits in CONFIG.calibration.bits),
        examples=CONFIG.calibration.examples,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("sensitivity"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn sensitivity {params.source:q} --calibration {params.calibration:q} {params.options}"
        " --examples {params.examples:q} --threads {threads} --out {params.out:q}"


rule choose_plan:
    input:
        sensitivity="results/{model}/sensitivity/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
        base="results/{model}/mnn/base/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/plans/{variant}/plan.yaml",
        manifest="results/{model}/plans/{variant}/manifest.json",
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
        sensitivity=subpath(input.sensitivity, parent=True),
        onnx=subpath(input.onnx, parent=True),
        base=subpath(input.base, parent=True),
        budget=lookup("{variant}", within={v: c.budget for v, c in CONFIG.variants.items()}),
        embedding=lookup("{variant}", within={v: c.embedding for v, c in CONFIG.variants.items()}),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("plan"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn plan {params.sensitivity:q} --onnx {params.onnx:q} --base {params.base:q} --budget {params.budget:q}"
        " --embedding {params.embedding:q} --out {params.out:q}"
