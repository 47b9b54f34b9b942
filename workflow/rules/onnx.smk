# The portable graphs: decoder with explicit KV cache, embedding, and a vision tower where the model sees.
rule export_onnx:
    input:
        source="results/{model}/source",
        toolchain=toolchain_files,
    output:
        directory("results/{model}/onnx"),
    log:
        "logs/export_onnx/{model}.log",
    benchmark:
        "benchmarks/export_onnx/{model}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory("onnx"),
        runtime=runtime("onnx"),
    params:
        fingerprint=stage_fingerprint("onnx"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn onnx {input.source:q} --out {output:q}"
