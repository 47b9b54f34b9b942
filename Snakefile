# Bundles of the models and variants in config.yaml, with the evidence for each. `hf2mnn STAGE --help` describes a stage.
from snakemake.utils import min_version

min_version("9.27")


include: "workflow/setup/check.smk"


configfile: "config.yaml"


include: "workflow/setup/path.smk"
include: "workflow/setup/s3.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/toolchain.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/examples.smk"
include: "workflow/rules/reference.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/sensitivity.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/baseline.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/diagnose.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/summary.smk"


rule all:
    default_target: True
    input:
        "results/summary.csv",
        "results/gates.txt",
        [f"results/{name}/changes.csv" for name, model in CONFIG.models.items() if model.before],


onstart:
    print_needs(CONFIG, Path("results"))


onsuccess:
    print_outcome(Path("results"), STORAGE.default_storage_prefix)


onerror:
    print_outcome(Path("results"), STORAGE.default_storage_prefix)
