# All conversions of a model in one table with a verdict, and one page with the evidence.
rule report_model:
    """
    Input: the folders of all other stages
    Output: summary and figures as csv and parquet, report.html
    """
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
        mem_mb=memory("report"),
        runtime=runtime("report"),
    params:
        variants=of_config(arguments.report_variants),
        folder=subpath(output.table, parent=True),
        fingerprint=fingerprint(stage_named("report")),
    shell:
        "logged {log:q} hf2mnn report {wildcards.model:q} {params.folder:q} --variants {params.variants:q}"
