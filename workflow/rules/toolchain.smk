# An environment with other releases of the tools, for the toolchains that config.yaml names.
rule make_toolchain:
    """
    Input: the pins of this repository
    Output: toolchain.json of a Python environment
    """
    input:
        requirements=Path(workflow.basedir, "requirements.txt"),
    output:
        ".toolchains/{toolchain}/toolchain.json",
    log:
        "logs/make_toolchain/{toolchain}.log",
    benchmark:
        "benchmarks/make_toolchain/{toolchain}.tsv"
    conda:
        "../../envs/mnn.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime="2h",
    params:
        asked=toolchain_json,
        out=subpath(output[0], parent=True),
    shell:
        "logged {log:q} hf2mnn toolchain {params.asked:q} --requirements {input.requirements:q} --out {params.out:q}"
