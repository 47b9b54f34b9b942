# Which bundles to make of which models, and in what order: config.yaml says what, `hf2mnn` knows how.
configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/toolchain.smk"
include: "workflow/rules/source.smk"
include: "workflow/rules/reference.smk"
include: "workflow/rules/onnx.smk"
include: "workflow/rules/mnn.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "results/summary.csv",
        "results/gates.txt",
        comparisons,


onstart:
    print_needs(CONFIG, Path("results"))


onsuccess:
    shell(SUMMARY)


onerror:
    shell(SUMMARY)
