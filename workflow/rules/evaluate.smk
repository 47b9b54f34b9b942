# Each conversion answers the evaluation set in the runtime that will run it.
rule evaluate_onnxruntime:
    input:
        reference="results/{model}/reference",
        onnx="results/{model}/onnx",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/eval/onnxruntime"),
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
        fingerprint=stage_fingerprint("evaluate"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn evaluate"
        " --reference {input.reference:q} --onnx {input.onnx:q} --threads {threads} --out {output:q}"


rule evaluate_variant:
    input:
        reference="results/{model}/reference",
        onnx="results/{model}/onnx",
        bundle="results/{model}/mnn/{variant}",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/eval/{variant}"),
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
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("evaluate"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn evaluate --reference {input.reference:q} --onnx {input.onnx:q} --bundle {input.bundle:q}"
        " --time-limit {params.time_limit} --threads {threads} --out {output:q}"


# Why a variant answers as it does: layer by layer, source by source, and the cause where something is wrong.
rule diagnose_variant:
    input:
        reference="results/{model}/reference",
        onnx="results/{model}/onnx",
        base="results/{model}/mnn/base",
        bundle="results/{model}/mnn/{variant}",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/diagnosis/{variant}"),
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
        time_limit=CONFIG.time_limit,
        fingerprint=stage_fingerprint("diagnose"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn diagnose --reference {input.reference:q} --onnx {input.onnx:q} --base {input.base:q}"
        " --bundle {input.bundle:q} --time-limit {params.time_limit} --threads {threads} --out {output:q}"


# Takes all cores, so that no other job of the run is timed along with it. On a cluster there is no such number.
rule measure_speed:
    input:
        bundles=bundles,
        toolchain=toolchain_files,
    output:
        directory("results/{model}/speed"),
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
        fingerprint=stage_fingerprint("speed"),
    shell:
        "logged {log:q} {input.toolchain:q}"
        " hf2mnn speed {params.options} --repeats {params.repeats:q} --prompt-tokens {params.prompt_tokens:q}"
        " --answer-tokens {params.answer_tokens:q} --picture-side {params.picture_side:q}"
        f" --threads {CONFIG.speed.threads or '{threads}'}"
        " --time-limit {params.time_limit} --out {output:q}"
