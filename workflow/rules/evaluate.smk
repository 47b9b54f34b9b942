# Each conversion answers the evaluation set in the runtime that will run it.
rule evaluate_onnxruntime:
    input:
        reference="results/{model}/reference/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/eval/onnxruntime/summary.json",
        "results/{model}/eval/onnxruntime/answers.parquet",
        "results/{model}/eval/onnxruntime/metrics.parquet",
        "results/{model}/eval/onnxruntime/pictures.parquet",
        "results/{model}/eval/onnxruntime/parity.parquet",
        "results/{model}/eval/onnxruntime/figures.parquet",
        "results/{model}/eval/onnxruntime/logits.safetensors",
        manifest="results/{model}/eval/onnxruntime/manifest.json",
    log:
        "logs/evaluate_onnxruntime/{model}.log",
    benchmark:
        "benchmarks/evaluate_onnxruntime/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("onnxruntime"),
        runtime=runtime("onnxruntime"),
    params:
        reference=subpath(input.reference, parent=True),
        onnx=subpath(input.onnx, parent=True),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("evaluate"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluate"
        " --reference {params.reference:q} --onnx {params.onnx:q} --threads {threads} --out {params.out:q}"


rule evaluate_variant:
    input:
        reference="results/{model}/reference/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
        bundle="results/{model}/mnn/{variant}/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/eval/{variant}/summary.json",
        "results/{model}/eval/{variant}/answers.parquet",
        "results/{model}/eval/{variant}/metrics.parquet",
        "results/{model}/eval/{variant}/pictures.parquet",
        "results/{model}/eval/{variant}/parity.parquet",
        "results/{model}/eval/{variant}/figures.parquet",
        "results/{model}/eval/{variant}/logits.safetensors",
        manifest="results/{model}/eval/{variant}/manifest.json",
    log:
        "logs/evaluate_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/evaluate_variant/{model}/{variant}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("engine"),
        runtime=runtime("engine"),
    params:
        reference=subpath(input.reference, parent=True),
        onnx=subpath(input.onnx, parent=True),
        bundle=subpath(input.bundle, parent=True),
        time_limit=CONFIG.time_limit,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("evaluate"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn evaluate --reference {params.reference:q} --onnx {params.onnx:q} --bundle {params.bundle:q}"
        " --time-limit {params.time_limit} --threads {threads} --out {params.out:q}"


# Why a variant answers as it does: layer by layer, source by source, and the cause where something is wrong.
rule diagnose_variant:
    input:
        reference="results/{model}/reference/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
        base="results/{model}/mnn/base/manifest.json",
        bundle="results/{model}/mnn/{variant}/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/diagnosis/{variant}/layers.parquet",
        "results/{model}/diagnosis/{variant}/budget.parquet",
        "results/{model}/diagnosis/{variant}/findings.json",
        manifest="results/{model}/diagnosis/{variant}/manifest.json",
    log:
        "logs/diagnose_variant/{model}/{variant}.log",
    benchmark:
        "benchmarks/diagnose_variant/{model}/{variant}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CONFIG.threads
    resources:
        mem_mb=memory("diagnose"),
        runtime=runtime("diagnose"),
    params:
        reference=subpath(input.reference, parent=True),
        onnx=subpath(input.onnx, parent=True),
        base=subpath(input.base, parent=True),
        bundle=subpath(input.bundle, parent=True),
        time_limit=CONFIG.time_limit,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("diagnose"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn diagnose --reference {params.reference:q} --onnx {params.onnx:q} --base {params.base:q}"
        " --bundle {params.bundle:q} --time-limit {params.time_limit} --threads {threads} --out {params.out:q}"


# Takes all cores, so that no other job of the run is timed along with it. On a cluster there is no such number.
rule measure_speed:
    input:
        bundles,
        toolchain=toolchain_files,
    output:
        "results/{model}/speed/speed.parquet",
        "results/{model}/speed/speed.csv",
        "results/{model}/speed/speed.json",
        "results/{model}/speed/cache.parquet",
        manifest="results/{model}/speed/manifest.json",
    log:
        "logs/measure_speed/{model}.log",
    benchmark:
        "benchmarks/measure_speed/{model}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: CORES or CONFIG.speed.threads or CONFIG.threads
    resources:
        mem_mb=memory("engine"),
        runtime=runtime("engine"),
    params:
        options=bundle_options,
        repeats=CONFIG.speed.repeats,
        prompt_tokens=CONFIG.speed.prompt_tokens,
        answer_tokens=CONFIG.speed.answer_tokens,
        picture_side=CONFIG.speed.picture_side,
        time_limit=CONFIG.time_limit,
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("speed"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn speed {params.options} --repeats {params.repeats:q} --prompt-tokens {params.prompt_tokens:q}"
        " --answer-tokens {params.answer_tokens:q} --picture-side {params.picture_side:q}"
        f" --threads {CONFIG.speed.threads or '{threads}'}"
        " --time-limit {params.time_limit} --out {params.out:q}"
