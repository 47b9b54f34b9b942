# The table of all models, and the gates.
rule summarize_models:
    """
    Input: the tables of the models
    Output: one table
    """
    input:
        expand("results/{model}/summary.csv", model=CONFIG.models),
    output:
        "results/summary.parquet",
        table=report("results/summary.csv", caption="../report/table.rst", category="All models"),
    log:
        "logs/summarize_models/all.log",
    benchmark:
        "benchmarks/summarize_models/all.tsv"
    retries: 0
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="10m",
    params:
        fingerprint=fingerprint(stage_named("report")),
    shell:
        "logged {log:q} hf2mnn summarize {input:q} --out {output.table:q}"


# Runs after the table, so that the figures are there when a gate is missed.
rule check_gates:
    """
    Input: the table of all models
    Output: a line, once every required row keeps its gates
    """
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
