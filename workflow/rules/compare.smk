# Differences between an instance of a model and the one before it. All cores, since bundles of both are timed.
rule compare_versions:
    """
    Input: the finished results of both
    Output: changes.csv and changes.md
    """
    input:
        unpack(both_versions),
        toolchain=toolchain_files,
    output:
        table="results/{model}/changes.csv",
        page=report("results/{model}/changes.md", caption="../report/changes.rst", category="{model}"),
    log:
        "logs/compare_versions/{model}.log",
    benchmark:
        "benchmarks/compare_versions/{model}.tsv"
    wildcard_constraints:
        model=names(name for name, model in CONFIG.models.items() if model.before),
    conda:
        "../../envs/mnn.yaml"
    threads: CORES or CONFIG.benchmark.threads or CONFIG.threads
    resources:
        mem_mb=memory("compare"),
        runtime=runtime("compare"),
    params:
        before=subpath(input.before, parent=True),
        after=subpath(input.after, parent=True),
        toolchain=toolchain_option,
        out=subpath(output.table, parent=True),
        fingerprint=stage_fingerprint("compare"),
    shell:
        "logged {log:q}"
        " hf2mnn compare {params.before:q} {params.after:q} --benchmark {params.toolchain:q} --out {params.out:q}"
