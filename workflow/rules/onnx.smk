# The portable graphs: decoder with explicit KV cache, embedding, and a vision tower where the model sees; the manifest
# names all there is.
rule export_onnx:
    input:
        "results/{model}/source/manifest.json",
        toolchain=toolchain_files,
    output:
        "results/{model}/onnx/decoder.onnx",
        "results/{model}/onnx/embedding.onnx",
        "results/{model}/onnx/model.json",
        manifest="results/{model}/onnx/manifest.json",
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
        source=subpath(input[0], parent=True),
        out=subpath(output.manifest, parent=True),
        fingerprint=stage_fingerprint("onnx"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn onnx {params.source:q} --out {params.out:q}"
