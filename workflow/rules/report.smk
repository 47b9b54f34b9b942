# The table of each model and of all, the page, and the gates.
rule report_model:
    input:
        evidence,
    output:
        "results/{model}/summary.parquet",
        "results/{model}/figures.parquet",
        table="results/{model}/summary.csv",
        figures=report("results/{model}/figures.csv", caption="../report/figures.rst", category="{model}"),
        page=report("results/{model}/report.html", caption="../report/page.rst", category="{model}"),
    log:
        "logs/report_model/{model}.log",
    benchmark:
        "benchmarks/report_model/{model}.tsv"
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime="30m",
    params:
        rows=rows,
        folder=subpath(output.table, parent=True),
        fingerprint=fingerprint("report"),
    shell:
        "logged {log:q} hf2mnn report {wildcards.model:q} {params.folder:q} --rows {params.rows:q}"


# What is better, worse and slower than in the instance before. All cores, since bundles of both are timed in turns.
rule compare_versions:
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
        model=names(model for model, made in CONFIG.models.items() if made.before),
    conda:
        "../../envs/mnn.yaml"
    threads: workflow.resource_settings.cores or CONFIG.speed.threads or CONFIG.threads
    resources:
        mem_mb=memory("engine"),
        runtime=runtime("engine"),
    params:
        before=subpath(input.before, parent=True),
        after=subpath(input.after, parent=True),
        options=engine_options,
        out=subpath(output.table, parent=True),
        fingerprint=stage_fingerprint("compare"),
    shell:
        "logged {log:q}"
        " hf2mnn compare {params.before:q} {params.after:q} --speed {params.options} --out {params.out:q}"


rule join_tables:
    input:
        expand("results/{model}/summary.csv", model=CONFIG.models),
    output:
        "results/summary.parquet",
        table=report("results/summary.csv", caption="../report/table.rst", category="All models"),
    log:
        "logs/join_tables/all.log",
    benchmark:
        "benchmarks/join_tables/all.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="10m",
    params:
        fingerprint=fingerprint("report"),
    shell:
        "logged {log:q} hf2mnn summarize {input:q} --out {output.table:q}"


# Comes after the table, so that the figures are there when a gate is missed.
rule check_gates:
    input:
        "results/summary.csv",
    output:
        "results/gates.txt",
    log:
        "logs/check_gates/all.log",
    benchmark:
        "benchmarks/check_gates/all.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="10m",
    shell:
        "logged {log:q} hf2mnn gates {input:q} --out {output:q}"
