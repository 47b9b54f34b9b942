# Shared by all rules: the checked configuration, wildcard constraints, and functions of wildcards.
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from hf2mnn.checkpoint.size import model_size
from hf2mnn.cli import arguments
from hf2mnn.cli.run_messages import print_needs, print_outcome
from hf2mnn.config.load import parse_config
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.fingerprint import fingerprint
from hf2mnn.stages import stage_named

STORAGE = workflow.storage_settings
# Cores of a run on this machine; a scheduler's job has its own number.
CORES = None if workflow.remote_exec else workflow.resource_settings.cores

try:
    CONFIG = parse_config(config)
except Hf2mnnError as error:
    raise WorkflowError(str(error)) from None

if CONFIG.toolchains and STORAGE.default_storage_provider:
    raise WorkflowError("object storage does not keep toolchains, which are environments (docs/kubernetes.md)")


def names(values):
    """Return a wildcard constraint for these names."""
    return "|".join(re.escape(name) for name in values) or "(?!)"


wildcard_constraints:
    model=names(CONFIG.models),
    variant=names(CONFIG.variants),
    set=names(arguments.SETS),
    toolchain=names(CONFIG.toolchains),


def of_model(function):
    """Return a function of wildcards that calls `function` with the model's configuration and its set, if any."""
    return lambda wildcards: function(CONFIG.models[wildcards.model], *wildcards.get("set", "").split())


def of_config(function):
    """Return a function of wildcards alone: Snakemake compares no other params with those of earlier runs."""
    return lambda wildcards: function(CONFIG, wildcards.get("variant") or wildcards.model)


def local_files(paths):
    """Return files of the machine that runs Snakemake, whatever storage the results are in."""
    return [local(str(path)) for path in paths]


def toolchain_json(wildcards):
    return CONFIG.toolchains[wildcards.toolchain].model_dump_json()


def toolchain_files(wildcards):
    """Return the toolchain.json of a model that another toolchain makes."""
    name = CONFIG.models[wildcards.model].toolchain
    return f".toolchains/{name}/toolchain.json" if name else []


def checkpoint_inputs(wildcards):
    return local_files(arguments.source_files(CONFIG.models[wildcards.model]))


def example_inputs(wildcards):
    return local_files(arguments.example_files(CONFIG.models[wildcards.model], wildcards.set))


def quantize_inputs(wildcards):
    """Return the inputs of a variant's methods by name."""
    needed = arguments.quantize_inputs(CONFIG, wildcards.variant)
    folders = {name: f"results/{wildcards.model}/{folder}" for name, folder in needed.items()}
    plan = CONFIG.variants[wildcards.variant].plan
    return folders | ({"plan": local(plan)} if plan else {})


def method_options(wildcards, input):
    inputs = {name: input[name] for name in quantize_inputs(wildcards)}
    return arguments.method_options(CONFIG, wildcards.variant, inputs)


def bundle_of(wildcards):
    """Return the bundle of a variant; the ONNX graphs in ONNX Runtime have none."""
    return [] if wildcards.variant == "onnxruntime" else f"results/{wildcards.model}/bundles/{wildcards.variant}"


def bundle_option(wildcards, input):
    return [f"--bundle={input.bundle}"] if input.bundle else []


def bundles(wildcards):
    return [f"results/{wildcards.model}/bundles/{name}" for name in CONFIG.variants_of(wildcards.model)]


def bundle_options(wildcards, input):
    return [f"--bundle={Path(folder).name}={folder}" for folder in input.bundles]


def evidence(wildcards, model=None):
    """Return all folders that a model's report reads."""
    model = model or wildcards.model
    return [f"results/{model}/{folder}" for folder in arguments.evidence(CONFIG, model)]


def toolchain_option(wildcards, input):
    return [f"--toolchain={Path(input.toolchain).parent}"] if input.toolchain else []


def both_versions(wildcards):
    """Return the finished tables of an instance and of the one before it, and the folders that they were made from."""
    after, before = wildcards.model, CONFIG.models[wildcards.model].before
    tables = {"before": f"results/{before}/summary.csv", "after": f"results/{after}/summary.csv"}
    return {**tables, "evidence": [*evidence(wildcards, before), *evidence(wildcards)]}


def stage_fingerprint(stage):
    """Return the fingerprint of a stage with the tools of a model's toolchain, as a function of wildcards."""
    return lambda wildcards: fingerprint(stage_named(stage), CONFIG.toolchain_of(wildcards.model).release)


def requested(stage, figure, extra=0):
    """Return a resource of a stage as a function of wildcards; it grows with each attempt."""

    def of(wildcards, attempt):
        source = CONFIG.models[wildcards.model].source
        # A hub's model has a typical size until it is fetched.
        size = model_size(source.path or f"results/{wildcards.model}/checkpoint", source.pin)
        footprint = stage_named(stage).footprint_of(wildcards.get("variant"))
        return attempt * (getattr(footprint, figure)(size.weights) + extra)

    return of


def memory(stage):
    # A scheduler's job has two Snakemake processes of 200 MB.
    return requested(stage, "memory_mb", 400 if workflow.non_local_exec else 0)


def runtime(stage):
    return requested(stage, "runtime_min")
