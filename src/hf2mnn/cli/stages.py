"""One command for each stage. Heavy packages are imported inside the commands, which keeps --help fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hf2mnn.cli.options import (
    CalibrationAnswers,
    Checkpoint,
    Embedding,
    GraphsFolder,
    Hub,
    OnnxFolder,
    Out,
    ReferenceFolder,
    Revision,
    Threads,
    TimeLimit,
    WeightsKept,
    example,
)
from hf2mnn.config.models import Dataset
from hf2mnn.core.errors import ConfigError, Hf2mnnError

app = typer.Typer()


@app.command(epilog=example("hf2mnn fetch --path models/shapes-vl --out results/shapes-vl/checkpoint"))
def fetch(
    out: Out,
    path: Annotated[Path | None, typer.Option(help="Local checkpoint folder.")] = None,
    repository: Annotated[str | None, typer.Option(help="owner/name on a hub.")] = None,
    revision: Revision = None,
    hub: Hub = "huggingface",
    pin: Annotated[Path | None, typer.Option(help="File of 'hf2mnn pin', in place of repository and revision.")] = None,
    files: Annotated[
        Path | None,
        typer.Option(help="Folder of user-provided files: those that match are used and not downloaded."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder with a LoRA adapter (PEFT) to merge.")] = None,
    adapter_repository: Annotated[str | None, typer.Option(help="owner/name of an adapter on a hub.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the adapter.")] = None,
    adapter_hub: Annotated[
        Literal["huggingface", "modelscope"], typer.Option(help="Hub of the adapter.")
    ] = "huggingface",
) -> None:
    """Fetch and check a checkpoint, and merge an adapter into it if one is given."""
    from hf2mnn.checkpoint.fetch import AdapterSource
    from hf2mnn.stages.fetch import run

    if adapter is None and adapter_repository is None:
        source = None
    else:
        source = AdapterSource(adapter, adapter_repository, adapter_revision, adapter_hub)
    run(out, path, repository, revision, hub, pin, files, source)


@app.command(
    epilog=example(
        "hf2mnn examples --dataset docvqa --samples 100 --out my-docvqa",
        "hf2mnn examples --path my-questions --out results/mine/examples/evaluation",
    )
)
def examples(
    out: Out,
    path: Annotated[
        Path | None,
        typer.Option(help="Folder with examples.jsonl; with --dataset, a local copy of that data set."),
    ] = None,
    dataset: Annotated[Dataset | None, typer.Option(help="Labelled data set to draw from.")] = None,
    samples: Annotated[int, typer.Option(help="Questions to draw from the data set.", min=1)] = 100,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of the data set on the hub.")] = "main",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Collect an evaluation or calibration set: your own, or questions of a labelled data set."""
    from hf2mnn.stages.examples import copy_set, draw_set

    if dataset is not None:
        draw_set(dataset, samples, out, path, revision, seed)
    elif path is not None:
        copy_set(path, out)
    else:
        raise Hf2mnnError("give --path FOLDER, --dataset NAME, or both")


@app.command(
    epilog=example(
        "hf2mnn reference results/shapes-vl/checkpoint --examples models/shapes-vl/evaluation"
        " --out results/shapes-vl/reference/evaluation"
    )
)
def reference(
    checkpoint: Checkpoint,
    out: Out,
    examples: Annotated[Path, typer.Option(help="Folder with examples.jsonl.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Answer a set with PyTorch in float32, for all comparisons."""
    from hf2mnn.stages.reference import run

    run(checkpoint, examples, out, max_new_tokens, threads, weights)


@app.command(epilog=example("hf2mnn export results/shapes-vl/checkpoint --out results/shapes-vl/onnx"))
def export(checkpoint: Checkpoint, out: Out) -> None:
    """Export decoder (with explicit KV cache), vision tower and embedding as ONNX."""
    from hf2mnn.stages.export import run

    run(checkpoint, out)


@app.command(epilog=example("hf2mnn convert results/shapes-vl/onnx --out results/shapes-vl/graphs"))
def convert(onnx: Annotated[Path, typer.Argument(help="Folder of the export stage.")], out: Out) -> None:
    """Convert the ONNX graphs to MNN graphs without weights, and check that every attention is fused."""
    from hf2mnn.stages.convert import run

    run(onnx, out)


@app.command(
    epilog=example(
        "hf2mnn calibrate results/shapes-vl/checkpoint --calibration results/shapes-vl/reference/calibration"
        " --evaluation results/shapes-vl/reference/evaluation --out results/shapes-vl/calibration"
    )
)
def calibrate(
    checkpoint: Checkpoint,
    out: Out,
    calibration: CalibrationAnswers,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of the reference stage for the evaluation set: no example may be in both."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Tokens or patches to keep of each layer's inputs.", min=1)] = 4096,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Record the inputs of each linear layer on the calibration set, for awq and gptq."""
    from hf2mnn.stages.calibrate import run

    run(checkpoint, calibration, evaluation, out, rows, threads, weights)


@app.command(
    epilog=example(
        "hf2mnn sensitivity results/shapes-vl/checkpoint --calibration results/shapes-vl/reference/calibration"
        " --out results/shapes-vl/sensitivity"
    )
)
def sensitivity(
    checkpoint: Checkpoint,
    out: Out,
    calibration: CalibrationAnswers,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits to measure with, 2 to 8; repeat for more.", min=2, max=8)
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples to measure with.", min=1)] = 32,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Measure the divergence of the answers when one operator alone is quantized, for bits: auto."""
    from hf2mnn.config.schema import Calibration
    from hf2mnn.stages.sensitivity import run

    run(checkpoint, calibration, out, sorted(set(bits or Calibration().bits)), examples, threads, weights)


@app.command(
    epilog=example(
        "hf2mnn plan results/shapes-vl/sensitivity --onnx results/shapes-vl/onnx --graphs results/shapes-vl/graphs"
        " --budget 4.25 --out results/shapes-vl/plans/auto"
    )
)
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="Folder of the sensitivity stage.")],
    out: Out,
    onnx: OnnxFolder,
    graphs: GraphsFolder,
    budget: Annotated[str, typer.Option(help="Bits per weight with scales (4.25), or the bundle's size (850MB).")],
    embedding: Embedding = "file",
) -> None:
    """Choose the format of each operator with the least divergence within a budget, and write plan.yaml."""
    from hf2mnn.config.budget import parse_budget
    from hf2mnn.stages.plan import run

    try:
        wanted = parse_budget(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    run(sensitivity, onnx, graphs, out, wanted, embedding)


@app.command(
    epilog=example(
        "hf2mnn quantize results/shapes-vl/onnx results/shapes-vl/graphs --out results/shapes-vl/bundles/int4"
        """ --decoder '{"bits": 4, "block": 64}' --vision '{"bits": 8}'"""
    )
)
def quantize(
    onnx: Annotated[Path, typer.Argument(help="Folder of the export stage.")],
    graphs: Annotated[Path, typer.Argument(help="Folder of the convert stage.")],
    out: Out,
    decoder: Annotated[
        str, typer.Option(help="Weights of the decoder, JSON: bits, block, symmetric, scale_bits, method.")
    ],
    vision: Annotated[str, typer.Option(help="Weights of the vision tower, JSON.")] = '{"bits": 8}',
    engine: Annotated[str, typer.Option(help="Settings of the engine, JSON: precision, memory, threads.")] = "{}",
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml: settings by operator, which override both.")] = None,
    embedding: Embedding = "file",
    calibration: Annotated[Path | None, typer.Option(help="Folder of the calibrate stage, for awq and gptq.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the fetch stage, for the values of an AWQ or GPTQ checkpoint.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads to round with.", min=1)] = 2,
) -> None:
    """Make a bundle: MNN's graphs with the checkpoint's weights in the chosen formats."""
    from hf2mnn.config.load import parse_option
    from hf2mnn.config.plan import load_plan
    from hf2mnn.config.variants import Engine, Weights
    from hf2mnn.mnn.bundle import EngineSettings
    from hf2mnn.quant.formats import WeightFormat
    from hf2mnn.quant.variant import Choice
    from hf2mnn.stages.quantize import run

    formats = [
        WeightFormat(**parse_option(Weights, text, name))
        for text, name in ((decoder, "--decoder"), (vision, "--vision"))
    ]
    settings = EngineSettings(**parse_option(Engine, engine, "--engine"))
    planned = load_plan(plan).model_dump(exclude_none=True) if plan else {}
    run(onnx, graphs, out, Choice(*formats, settings, planned, embedding), threads, calibration, checkpoint, plan)


@app.command(
    epilog=example(
        "hf2mnn baseline --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx"
        " --graphs results/shapes-vl/graphs --out results/shapes-vl/baseline"
    )
)
def baseline(
    out: Out,
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    graphs: GraphsFolder,
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
) -> None:
    """Make and run the float32 bundle that the diagnoses of all variants compare with."""
    from hf2mnn.stages.baseline import run

    run(reference, onnx, graphs, out, threads, time_limit)


@app.command(
    epilog=example(
        "hf2mnn evaluate --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx"
        " --bundle results/shapes-vl/bundles/int4 --out results/shapes-vl/evaluation/int4"
    )
)
def evaluate(
    out: Out,
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle to run in MNN's engine; left out, the ONNX graphs run.")
    ] = None,
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
    keep_logits: Annotated[
        bool, typer.Option("--keep-logits", help="Also write logits.safetensors, to recompute figures.")
    ] = False,
) -> None:
    """Answer the evaluation set with a conversion and measure its distance from PyTorch."""
    from hf2mnn.stages.evaluate import run

    run(reference, onnx, out, bundle, threads, time_limit, keep_logits)


@app.command(
    epilog=example(
        "hf2mnn diagnose --reference results/shapes-vl/reference/evaluation --onnx results/shapes-vl/onnx"
        " --baseline results/shapes-vl/baseline --bundle results/shapes-vl/bundles/int4"
        " --out results/shapes-vl/diagnosis/int4"
    )
)
def diagnose(
    out: Out,
    reference: ReferenceFolder,
    onnx: OnnxFolder,
    baseline: Annotated[Path, typer.Option(help="Folder of the baseline stage.")],
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    threads: Threads = 2,
    time_limit: TimeLimit = 7200,
) -> None:
    """Find the causes of a bundle's error: layer by layer, source by source."""
    from hf2mnn.stages.diagnose import run

    findings = run(reference, onnx, baseline, bundle, out, threads, time_limit)
    for finding in findings:
        print(f"{finding.part}: {finding.message}")
    print(f"{len(findings) or 'no'} findings")


@app.command(
    epilog=example(
        "hf2mnn benchmark --bundle fp16=results/shapes-vl/bundles/fp16 --bundle int4=results/shapes-vl/bundles/int4"
        " --baseline fp16 --out results/shapes-vl/benchmark"
    )
)
def benchmark(
    out: Out,
    bundle: Annotated[list[str], typer.Option(help="NAME=FOLDER of a bundle; repeat for more.")],
    baseline: Annotated[str, typer.Option(help="Name of the bundle that the others are compared with.")],
    repeats: Annotated[int, typer.Option(help="Processes to time each bundle with, interleaved.", min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.", min=1)] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Length of the answer in tokens.", min=1)] = 64,
    image_side: Annotated[int, typer.Option(help="Width and height of the image in pixels.", min=1)] = 224,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens in the KV cache when its gain is measured; repeat for more.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 for all cores.", min=0)] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds after which one process is stopped.", min=1)] = 7200,
) -> None:
    """Time bundles of one model against each other, and measure their memory and the gain of the KV cache."""
    from hf2mnn.evaluation.benchmark import parse_bundles
    from hf2mnn.report.console import print_speed
    from hf2mnn.stages.benchmark import run

    lengths = sorted(set(length)) if length else None
    options = (repeats, prompt_tokens, answer_tokens, threads, image_side, lengths, time_limit)
    print_speed(run(parse_bundles(bundle), baseline, out, *options))


@app.command(
    epilog=example(
        "hf2mnn report shapes-vl results/shapes-vl"
        """ --variants '[{"name": "int4", "required": false, "gates": {"mean_kld": 0.1}}]'"""
    )
)
def report(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    folder: Annotated[
        Path, typer.Argument(help="Results of the model; summary, figures and report.html are written there.")
    ],
    variants: Annotated[str, typer.Option(help="Variants in order, JSON: name, required, gates.")],
) -> None:
    """Put all conversions of a model in one table with a verdict, and on one page with the evidence."""
    from hf2mnn.config.load import parse_option
    from hf2mnn.config.variants import ReportVariants
    from hf2mnn.report.table import VariantSpec
    from hf2mnn.stages.report import run

    run(model, folder, [VariantSpec(**variant) for variant in parse_option(ReportVariants, variants, "--variants")])


@app.command(
    epilog=example(
        "hf2mnn compare results/qwen2-vl-2b results/qwen2.5-vl-3b", "hf2mnn compare --layers results/shapes-vl"
    )
)
def compare(
    before: Annotated[Path, typer.Argument(help="Results of a model: results/<model>.")],
    after: Annotated[
        Path | None, typer.Argument(help="Results of another version; by default the first is shown alone.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer: PyTorch, ONNX and MNN on the same input.")
    ] = False,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; repeat for more.")] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time the bundles of both versions now, in interleaved runs.")
    ] = False,
    toolchain: Annotated[
        Path | None,
        typer.Option(help="Folder of 'hf2mnn toolchain' whose engine runs the other version, for --benchmark."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for changes.csv and changes.md.")] = None,
) -> None:
    """Report differences between two versions of a model, and the first layer that changed.

    With --layers it shows where each variant exceeds its tolerance.
    """
    from hf2mnn.report.console import print_layers, print_table, print_versions
    from hf2mnn.report.versions import read_report
    from hf2mnn.stages.compare import run

    for folder in filter(None, (before, after)):
        evidence, table = read_report(folder, variant)
        print_table(table)
        if layers:
            print_layers(evidence)
    if after:
        print_versions(run(before, after, variant, benchmark, toolchain, out))
