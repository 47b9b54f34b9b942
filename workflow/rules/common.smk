# Shared by all stages: the checked configuration, the names that a wildcard may take, and what a stage depends on.
import json
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

# `logged` and `hf2mnn` are those in this folder; the latter runs in a stage's environment, or with the Python that runs
# Snakemake, whether or not that one's environment is active.
TOOLS = [str(Path(workflow.basedir, "workflow")), str(Path(sys.executable).parent)]
os.environ.update(PATH=os.pathsep.join([*TOOLS, os.environ.get("PATH", os.defpath)]))

from hf2mnn.config import parse_config
from hf2mnn.errors import Hf2mnnError
from hf2mnn.fingerprint import fingerprint
from hf2mnn.footprint import STAGES
from hf2mnn.report.needs import print_needs
from hf2mnn.source.checkpoint import ADAPTER_FILES, checkpoint_files
from hf2mnn.source.size import model_size
from hf2mnn.verify import damaged_below

try:
    CONFIG = parse_config(config)
except Hf2mnnError as error:
    raise WorkflowError(str(error)) from None

if CONFIG.toolchains and workflow.storage_settings.default_storage_provider:
    raise WorkflowError(
        "toolchains are environments, which object storage does not keep: take them out of config.yaml, or"
        " --default-storage-provider away (docs/cluster.md)"
    )


if workflow.storage_settings.default_storage_provider == "s3":
    from snakemake_storage_plugin_s3 import StorageObject

    # Its own (0.3.6) remembers that a folder was not there, and does not look again when a job elsewhere has made it.
    StorageObject.is_dir = lambda self: any(self.get_subkeys())

if workflow.is_main_process:
    for said in damaged_below(Path("results")):
        logger.warning(said)


# What a person reads at the end: the comparison, where there is one, and what the stages took; or where they lie.
SUMMARY = (
    f"echo 'results: {workflow.storage_settings.default_storage_prefix}/results'"
    if workflow.storage_settings.default_storage_provider
    else "test ! -f results/summary.csv || hf2mnn table results/summary.csv;"
    " ! ls results/*/source/manifest.json > /dev/null 2>&1 || hf2mnn stages results"
)


def names(values):
    """A wildcard constraint that takes these names and nothing else."""
    return "|".join(re.escape(name) for name in values) or "(?!)"


# That a run on this machine was given; a scheduler's job has its own number, which says nothing of the run.
CORES = None if workflow.remote_exec else workflow.resource_settings.cores


wildcard_constraints:
    model=names(CONFIG.models),
    variant=names(CONFIG.variants),
    toolchain=names(CONFIG.toolchains),


def toolchain_files(wildcards):
    """The environment in which an instance's stages run, where it is another than ours."""
    name = CONFIG.models[wildcards.model].toolchain
    return f".toolchains/{name}/toolchain.json" if name else []


def toolchain_json(wildcards):
    return CONFIG.toolchains[wildcards.toolchain].model_dump_json()


def stage_fingerprint(stage):
    """That of a stage with the tools of an instance's toolchain."""

    def of(wildcards):
        return fingerprint(stage, CONFIG.toolchain_of(wildcards.model))

    return of


def here(paths):
    """Files that lie where Snakemake is started, whatever storage the results go to."""
    return [local(str(path)) for path in paths]


def files_below(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def source_files(wildcards):
    """Files of a local checkpoint and adapter, or a pin, so that a changed one is noticed; a hub's revision stands in
    the params."""
    source = CONFIG.models[wildcards.model].source
    files = [source.pin] if source.pin else checkpoint_files(source.path)
    return here(files + (checkpoint_files(source.adapter, ADAPTER_FILES) if isinstance(source.adapter, str) else []))


def source_options(wildcards):
    source = CONFIG.models[wildcards.model].source
    given = source.model_dump(exclude_none=True, exclude_unset=True)
    if isinstance(given.get("adapter"), dict):
        given |= {f"adapter-{name}": value for name, value in given.pop("adapter").items()}
    return shlex.join(word for name, value in given.items() for word in (f"--{name}", value))


def labelled(model):
    """Whether the model's evaluation set is drawn from a labelled data set."""
    return not isinstance(CONFIG.models[model].evaluation, str)


def examples_folder(wildcards):
    """A person's own set: `role` is the key of a model's that names it."""
    return getattr(CONFIG.models[wildcards.model], wildcards.role)


def own_examples(wildcards):
    return here(files_below(examples_folder(wildcards)))


def labelled_files(wildcards):
    """Files of a data set's local copy, so that a changed one is noticed; a hub's revision stands in the params."""
    path = CONFIG.models[wildcards.model].evaluation.path
    return here(files_below(path)) if path else []


def labelled_options(wildcards):
    chosen = CONFIG.models[wildcards.model].evaluation
    where = ["--path", chosen.path] if chosen.path else ["--revision", chosen.revision]
    options = ["--dataset", chosen.dataset, "--samples", str(chosen.samples), "--seed", str(chosen.seed), *where]
    return shlex.join(options)


def choices(wildcards):
    """What a variant's weights are chosen by, beside its settings: only what its methods need."""
    model, variant = f"results/{wildcards.model}", CONFIG.variants[wildcards.variant]
    found = {}
    if variant.auto:
        found["plan"] = f"{model}/plans/{wildcards.variant}"
    elif variant.plan:
        found["plan"] = local(variant.plan)
    if CONFIG.calibrated(wildcards.variant):
        found["activations"] = f"{model}/activations"
    if "checkpoint" in CONFIG.methods(wildcards.variant):
        found["source"] = f"{model}/source"
    return found


def choice_options(wildcards, input):
    variant = CONFIG.variants[wildcards.variant]
    options = ["--embedding", variant.embedding]
    for name in choices(wildcards):
        options += [f"--{name}", f"{input.plan}/plan.yaml" if name == "plan" and variant.auto else input[name]]
    return shlex.join(options)


def weights(part):
    """JSON of the weight settings of a variant's decoder or vision tower."""
    chosen = {"decoder": CONFIG.decoder_weights, "vision": CONFIG.vision_weights}[part]

    def of(wildcards):
        described = chosen(wildcards.variant).model_dump(include={"bits", "block", "symmetric", "scale_bits", "method"})
        return json.dumps(described, sort_keys=True)

    return of


def engine(wildcards):
    return json.dumps(CONFIG.engine(wildcards.variant).model_dump(), sort_keys=True)


def bundles(wildcards):
    return [f"results/{wildcards.model}/mnn/{name}" for name in CONFIG.variants_of(wildcards.model)]


def bundle_options(wildcards, input):
    options = [word for folder in input.bundles for word in ("--bundle", f"{Path(folder).name}={folder}")]
    return shlex.join([*options, "--baseline", CONFIG.baseline(wildcards.model)])


def rows_of(model):
    return ["onnxruntime", *CONFIG.variants_of(model)]


def evidence_of(model):
    """Everything that a model's report is made of, and what that was made of."""
    variants = CONFIG.variants_of(model)
    chosen = [name for name in variants if CONFIG.variants[name].auto]
    calibrated = [name for name in variants if CONFIG.calibrated(name)]
    stages = ["source", "examples/evaluation", "reference", "onnx", "mnn/base", "speed"]
    stages += [f"eval/{row}" for row in rows_of(model)]
    stages += [f"{stage}/{variant}" for variant in variants for stage in ("mnn", "diagnosis")]
    stages += [f"plans/{variant}" for variant in chosen]
    stages += ["examples/calibration", "calibration"] if chosen or calibrated else []
    stages += ["sensitivity"] if chosen else []
    stages += ["activations"] if calibrated else []
    return [f"results/{model}/{stage}" for stage in stages]


def evidence(wildcards):
    return evidence_of(wildcards.model)


def both_versions(wildcards):
    """The finished tables of an instance and of the one before it, and what they were made of."""
    after, before = wildcards.model, CONFIG.models[wildcards.model].before
    tables = {"before": f"results/{before}/summary.csv", "after": f"results/{after}/summary.csv"}
    return {**tables, "evidence": [*evidence_of(before), *evidence_of(after)]}


def comparisons(wildcards):
    return [f"results/{model}/changes.csv" for model, made in CONFIG.models.items() if made.before]


def engine_options(wildcards):
    """Whose engine an instance's bundles are timed in."""
    toolchain = CONFIG.models[wildcards.model].toolchain
    return shlex.join(["--toolchain", f".toolchains/{toolchain}"] if toolchain else [])


def rows(wildcards):
    """JSON of the table's rows, with their gates."""
    described = [
        {"name": row, "required": CONFIG.required(row), "gates": CONFIG.row_gates(row)}
        for row in rows_of(wildcards.model)
    ]
    return json.dumps(described, sort_keys=True)


def weights_of(model):
    """How many weights a model has. That of a hub is taken for a typical one until it is fetched: Snakemake asks again
    for each job that can start."""
    source = CONFIG.models[model].source
    return model_size(source.path or f"results/{model}/source", source.pin).weights


def by_size(figure):
    """A resource that grows with the model, and with each attempt: a scheduler stops what is over it."""

    def of(wildcards, attempt):
        return figure(weights_of(wildcards.model)) * attempt

    return of


SNAKEMAKE_MB = 400
"""A scheduler's job holds Snakemake twice beside its stage: the one that it starts, and the one that srun starts."""


def memory(stage):
    """mem_mb of a stage."""

    def figure(weights):
        return STAGES[stage].memory_mb(weights) + (SNAKEMAKE_MB if workflow.non_local_exec else 0)

    return by_size(figure)


def runtime(stage):
    """Minutes after which a scheduler may stop a stage."""
    return by_size(STAGES[stage].runtime_min)
