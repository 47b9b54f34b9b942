# The checkpoint as portable ONNX graphs with an explicit KV cache.
rule export_onnx:
    """
    Input: the checkpoint
    Output: decoder, embedding and vision tower as ONNX, model.json, the tokenizer's files
    """
    input:
        checkpoint="results/{model}/checkpoint",
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
        mem_mb=memory("export"),
        runtime=runtime("export"),
    params:
        fingerprint=stage_fingerprint("export"),
    shell:
        "logged {log:q} {input.toolchain:q} hf2mnn export {input.checkpoint:q} --out {output:q}"
