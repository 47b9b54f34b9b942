# Each conversion answers the evaluation set in the runtime that will run it.
rule evaluate_onnxruntime:
    input:
        reference="results/{model}/reference/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
    output:
        "results/{model}/eval/onnxruntime/summary.json",
        "results/{model}/eval/onnxruntime/answers.parquet",
        "results/{model}/eval/onnxruntime/metrics.parquet",
        "results/{model}/eval/onnxruntime/pictures.parquet",
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
        mem_mb=memory(1500, 2.5),
        runtime="8h",
    params:
        reference=subpath(input.reference, parent=True),
        onnx=subpath(input.onnx, parent=True),
        out=subpath(output.manifest, parent=True),
        fingerprint=fingerprint("evaluate"),
    shell:
        "hf2mnn evaluate --reference {params.reference:q} --onnx {params.onnx:q} --threads {threads} --out {params.out:q}"
        " > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"


rule evaluate_variant:
    input:
        reference="results/{model}/reference/manifest.json",
        onnx="results/{model}/onnx/manifest.json",
        bundle="results/{model}/mnn/{variant}/manifest.json",
    output:
        "results/{model}/eval/{variant}/summary.json",
        "results/{model}/eval/{variant}/answers.parquet",
        "results/{model}/eval/{variant}/metrics.parquet",
        "results/{model}/eval/{variant}/pictures.parquet",
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
        mem_mb=memory(1500, 2.5),
        runtime="8h",
    params:
        reference=subpath(input.reference, parent=True),
        onnx=subpath(input.onnx, parent=True),
        bundle=subpath(input.bundle, parent=True),
        time_limit=CONFIG.time_limit,
        out=subpath(output.manifest, parent=True),
        fingerprint=fingerprint("evaluate"),
    shell:
        "hf2mnn evaluate --reference {params.reference:q} --onnx {params.onnx:q} --bundle {params.bundle:q}"
        " --time-limit {params.time_limit} --threads {threads} --out {params.out:q}"
        " > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}"
