"""The command line: one subcommand for each stage, and what a person needs around them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf2mnn import __version__
from hf2mnn.errors import ConfigError, GateError, Hf2mnnError
from hf2mnn.shortage import sentence

app = typer.Typer(
    name="hf2mnn",
    help=(
        "Turn a Hugging Face vision-language model into MNN bundles, and prove each one against PyTorch.\n\n"
        "'snakemake --cores N' runs all stages for the models and variants of config.yaml; each also runs by hand:"
        " source, evaluation, reference, onnx, mnn, activations, sensitivity, plan, quantize, evaluate, diagnose,"
        " speed, report."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option("--out", help="Folder to write; replaced as a whole when the stage has succeeded.")]
Threads = Annotated[int, typer.Option(help="Threads to compute with; 0 leaves it to the runtime.", min=0)]
WeightsKept = Annotated[
    Literal["auto", "resident", "mapped"],
    typer.Option(
        help="resident holds the model's weights in float32; mapped reads them from the checkpoint as each layer runs:"
        " the same results in less memory, slower; auto is resident where they fit.",
    ),
]
Hub = Annotated[Literal["huggingface", "modelscope"], typer.Option(help="The hub that has the repository.")]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the repository; left out, the hub's default branch.")
]


def _example(text: str) -> str:
    return f"Example: {text}"


@app.command(epilog=_example("hf2mnn source --path models/shapes-vl --out results/shapes-vl/source"))
def source(
    out: Out,
    path: Annotated[Path | None, typer.Option(help="A checkpoint folder on this machine.")] = None,
    repository: Annotated[str | None, typer.Option(help="owner/name on a hub.")] = None,
    revision: Revision = None,
    hub: Hub = "huggingface",
    pin: Annotated[
        Path | None, typer.Option(help="A file that 'hf2mnn pin' has written, instead of repository and revision.")
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(help="Folder with files put in place by hand: those that match are taken, not downloaded."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder with a LoRA adapter (PEFT) to merge.")] = None,
    adapter_repository: Annotated[str | None, typer.Option(help="owner/name of an adapter on a hub, instead.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the adapter.")] = None,
    adapter_hub: Annotated[
        Literal["huggingface", "modelscope"], typer.Option(help="The hub that has the adapter.")
    ] = "huggingface",
) -> None:
    """Check a checkpoint and put its files where the other stages look, with an adapter merged into them if one is
    given."""
    from hf2mnn.source.fetch import AdapterPlace, fetch_source

    if adapter is None and adapter_repository is None:
        place = None
    else:
        place = AdapterPlace(adapter, adapter_repository, adapter_revision, adapter_hub)
    fetch_source(out, path, repository, revision, hub, pin, files, place)


@app.command(epilog=_example("hf2mnn pin Qwen/Qwen2-VL-2B-Instruct --revision main --out qwen2-vl-2b.json"))
def pin(
    repository: Annotated[str, typer.Argument(help="owner/name on a hub.")],
    revision: Revision = None,
    hub: Hub = "huggingface",
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the commit with its files' sizes and hashes, JSON.")
    ] = None,
) -> None:
    """Print the commit that a branch or tag is now, for config.yaml; nothing is downloaded."""
    from hf2mnn.source.hub import pin_repository

    pinned = pin_repository(repository, revision, hub)
    if out:
        pinned.save(out)
    print(pinned.revision)


@app.command(
    epilog=_example(
        "hf2mnn reference results/shapes-vl/source --evaluation models/shapes-vl/evaluation"
        " --out results/shapes-vl/reference"
    )
)
def reference(
    source: Annotated[Path, typer.Argument(help="Folder of the source stage.")],
    out: Out,
    evaluation: Annotated[Path, typer.Option(help="Folder with examples.jsonl.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Let PyTorch answer the evaluation set in float32, once for all comparisons."""
    from hf2mnn.reference.run import run_reference

    run_reference(source, evaluation, out, max_new_tokens, threads, weights)


@app.command(
    epilog=_example("hf2mnn evaluation --dataset docvqa --samples 100 --out my-docvqa")
    + "\n\n"
    + _example("hf2mnn evaluation --examples my-questions --out results/mine/examples/evaluation")
)
def evaluation(
    out: Out,
    dataset: Annotated[str | None, typer.Option(help="textvqa, docvqa, chartqa, ai2d, mmbench or mmmu.")] = None,
    samples: Annotated[int, typer.Option(help="Questions to draw.", min=1)] = 100,
    path: Annotated[Path | None, typer.Option(help="A local copy of the data set; left out, the hub's.")] = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of the data set on the hub.")] = "main",
    seed: Annotated[int, typer.Option(help="Which questions are drawn.")] = 0,
    examples: Annotated[
        Path | None, typer.Option(help="A set of your own, a folder with examples.jsonl, in place of a data set.")
    ] = None,
) -> None:
    """Make an evaluation set of some questions of a labelled data set, or of a set of your own."""
    from hf2mnn.reference.labelled import make_labelled
    from hf2mnn.reference.own import take_examples

    if (dataset is None) == (examples is None):
        raise Hf2mnnError("give either --dataset NAME or --examples FOLDER")
    if examples:
        take_examples(examples, out)
    else:
        make_labelled(dataset, samples, out, path, revision, seed)


@app.command(epilog=_example("hf2mnn onnx results/shapes-vl/source --out results/shapes-vl/onnx"))
def onnx(source: Annotated[Path, typer.Argument(help="Folder of the source stage.")], out: Out) -> None:
    """Export decoder (explicit KV cache), vision tower and embedding as ONNX."""
    from hf2mnn.onnx.export import export_onnx

    export_onnx(source, out)


@app.command(epilog=_example("hf2mnn mnn results/shapes-vl/onnx --out results/shapes-vl/mnn/base"))
def mnn(onnx: Annotated[Path, typer.Argument(help="Folder of the onnx stage.")], out: Out) -> None:
    """Convert the ONNX graphs to MNN's, and prove that every attention is fused; 'hf2mnn quantize' adds the weights."""
    from hf2mnn.mnn.stages import convert_graphs

    convert_graphs(onnx, out)


@app.command(
    epilog=_example(
        "hf2mnn activations results/shapes-vl/source --calibration results/shapes-vl/calibration"
        " --evaluation results/shapes-vl/reference --out results/shapes-vl/activations"
    )
)
def activations(
    source: Annotated[Path, typer.Argument(help="Folder of the source stage.")],
    out: Out,
    calibration: Annotated[Path, typer.Option(help="Folder that 'hf2mnn reference' has made of the calibration set.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder that it has made of the evaluation set: no example may be in both."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Tokens or patches of which a layer's inputs are kept.", min=1)] = 4096,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Record what each linear layer reads on the calibration set, for awq and gptq."""
    from hf2mnn.reference.linear_inputs import record_activations

    record_activations(source, calibration, evaluation, out, rows, threads, weights)


@app.command(
    epilog=_example(
        "hf2mnn sensitivity results/shapes-vl/source --calibration results/shapes-vl/calibration"
        " --out results/shapes-vl/sensitivity"
    )
)
def sensitivity(
    source: Annotated[Path, typer.Argument(help="Folder of the source stage.")],
    out: Out,
    calibration: Annotated[Path, typer.Option(help="Folder that 'hf2mnn reference' has made of the calibration set.")],
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits to measure with, 2 to 8; again for more.", min=2, max=8)
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples to measure with.", min=1)] = 32,
    threads: Threads = 2,
    weights: WeightsKept = "auto",
) -> None:
    """Measure what it costs the answers when one operator alone is quantized, for bits: auto."""
    from hf2mnn.config import Calibration
    from hf2mnn.quant.sensitivity import measure_sensitivity

    wanted = sorted(set(bits or Calibration().bits))
    measure_sensitivity(source, calibration, out, wanted, examples, threads, weights)


@app.command(
    epilog=_example(
        "hf2mnn plan results/shapes-vl/sensitivity --onnx results/shapes-vl/onnx --base results/shapes-vl/mnn/base"
        " --budget 4.25 --out results/shapes-vl/plans/auto"
    )
)
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="Folder of the sensitivity stage.")],
    out: Out,
    onnx: Annotated[Path, typer.Option(help="Folder of the onnx stage.")],
    base: Annotated[Path, typer.Option(help="Folder of the mnn stage.")],
    budget: Annotated[str, typer.Option(help="Bits a weight with scales (4.25), or the bundle's size (850MB).")],
    embedding: Annotated[str, typer.Option(help="Where the embedding will be: file or lm_head.")] = "file",
) -> None:
    """Choose the format of each operator that costs the answers least within a budget, and write plan.yaml."""
    from hf2mnn.budget import parse_budget
    from hf2mnn.quant.plan import make_plan

    try:
        wanted = parse_budget(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    make_plan(sensitivity, onnx, base, out, wanted, embedding)


@app.command(
    epilog=_example(
        "hf2mnn quantize results/shapes-vl/onnx results/shapes-vl/mnn/base --out results/shapes-vl/mnn/int4"
        """ --decoder '{"bits": 4, "block": 64}' --vision '{"bits": 8}'"""
    )
)
def quantize(
    onnx: Annotated[Path, typer.Argument(help="Folder of the onnx stage.")],
    base: Annotated[Path, typer.Argument(help="Folder of the mnn stage.")],
    out: Out,
    decoder: Annotated[
        str, typer.Option(help="Weights of the decoder, JSON: bits, block, symmetric, scale_bits, method.")
    ],
    vision: Annotated[str, typer.Option(help="Weights of the vision tower, JSON.")] = '{"bits": 8}',
    engine: Annotated[str, typer.Option(help="Run-time settings, JSON: precision, memory, threads.")] = "{}",
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml: settings by operator, over those two.")] = None,
    embedding: Annotated[
        str, typer.Option(help="Where the engine reads the embedding: file, or lm_head of a tied model.")
    ] = "file",
    activations: Annotated[Path | None, typer.Option(help="Folder of the activations stage, for awq and gptq.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder of the source stage, for the levels of an AWQ or GPTQ checkpoint.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads to round with.", min=1)] = 2,
) -> None:
    """Make a bundle: the graphs of the mnn stage, and the checkpoint's weights in the formats that are asked for."""
    from hf2mnn.config import Engine, Weights, load_plan, parse_json
    from hf2mnn.mnn.bundle import EngineSettings
    from hf2mnn.mnn.convert import WeightFormat
    from hf2mnn.quant.stages import quantize as make
    from hf2mnn.quant.variant import Choice

    formats = [
        WeightFormat(**parse_json(Weights, text, name)) for text, name in ((decoder, "--decoder"), (vision, "--vision"))
    ]
    settings = EngineSettings(**parse_json(Engine, engine, "--engine"))
    choice = Choice(*formats, settings, load_plan(plan).model_dump(exclude_none=True) if plan else {}, embedding)
    make(onnx, base, out, choice, threads, activations, source, plan)


@app.command(
    epilog=_example(
        "hf2mnn evaluate --reference results/shapes-vl/reference --onnx results/shapes-vl/onnx"
        " --bundle results/shapes-vl/mnn/int4 --out results/shapes-vl/eval/int4"
    )
)
def evaluate(
    out: Out,
    reference: Annotated[Path, typer.Option(help="Folder of the reference stage.")],
    onnx: Annotated[Path, typer.Option(help="Folder of the onnx stage.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle to run in MNN's engine; left out, the ONNX graphs run.")
    ] = None,
    threads: Threads = 2,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)] = 7200,
) -> None:
    """Answer the evaluation set with a conversion and measure how far it is from PyTorch."""
    from hf2mnn.evaluate.run import evaluate as run

    run(reference, onnx, out, bundle, threads, time_limit)


@app.command(
    epilog=_example(
        "hf2mnn diagnose --reference results/shapes-vl/reference --onnx results/shapes-vl/onnx"
        " --base results/shapes-vl/mnn/base --bundle results/shapes-vl/mnn/int4"
        " --out results/shapes-vl/diagnosis/int4"
    )
)
def diagnose(
    out: Out,
    reference: Annotated[Path, typer.Option(help="Folder of the reference stage.")],
    onnx: Annotated[Path, typer.Option(help="Folder of the onnx stage.")],
    base: Annotated[Path, typer.Option(help="Folder of the mnn stage.")],
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    threads: Threads = 2,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)] = 7200,
) -> None:
    """Find out why a bundle answers as it does: layer by layer, source by source, and what is wrong."""
    from hf2mnn.evaluate.diagnose import diagnose as run

    found = run(reference, onnx, base, bundle, out, threads, time_limit)
    for finding in found:
        print(f"{finding.part}: {finding.sentence}")
    print(f"{len(found) or 'no'} findings")


@app.command(
    epilog=_example(
        "hf2mnn report shapes-vl results/shapes-vl"
        """ --rows '[{"name": "int4", "required": false, "gates": {"mean_kld": 0.1}}]'"""
    )
)
def report(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    folder: Annotated[Path, typer.Argument(help="The model's results; summary, figures and report.html go there too.")],
    rows: Annotated[str, typer.Option(help="Rows of the table in order, JSON: name, required, gates.")],
) -> None:
    """Put all conversions of a model in one table with a verdict, and on one page with the evidence."""
    from hf2mnn.config import TableRows, parse_json
    from hf2mnn.report.report import RowSpec, make_report

    make_report(model, folder, [RowSpec(**row) for row in parse_json(TableRows, rows, "--rows")])


@app.command(
    epilog=_example("hf2mnn compare results/qwen2-vl-2b results/qwen2.5-vl-3b")
    + "\n\n"
    + _example("hf2mnn compare --layers results/shapes-vl")
)
def compare(
    one: Annotated[Path, typer.Argument(help="Results of a model: results/<model>.")],
    other: Annotated[
        Path | None, typer.Argument(help="Results of another version; left out, the first is shown alone.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Layer by layer: PyTorch against ONNX against MNN on the same input.")
    ] = False,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; give it again for more.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time the bundles of both against each other now, in turns.")
    ] = False,
    toolchain: Annotated[
        Path | None,
        typer.Option(help="Folder of 'hf2mnn toolchain' with which the other version was made, for --speed."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for changes.csv and changes.md.")] = None,
) -> None:
    """Say what is better, worse and slower in another version of a model, and which layer changed first; or, with
    --layers, where each variant leaves PyTorch."""
    from hf2mnn.report.changes import write_changes
    from hf2mnn.report.console import print_layers, print_table, print_versions
    from hf2mnn.report.versions import compare_versions, read_report, time_both

    found = [read_report(folder, variant) for folder in (one, other) if folder]
    for evidence, table in found:
        print_table(table)
        if layers:
            print_layers(evidence)
    if len(found) == 2:
        both, tables = zip(*found, strict=True)
        python = toolchain.resolve() / "bin" / "python" if toolchain else None
        speeds = time_both(*both, python) if speed else None
        versions = compare_versions(*both, speeds=speeds)
        print_versions(versions)
        if out:
            write_changes(out, versions, tables, speeds or ({}, {}))


@app.command(epilog=_example("""hf2mnn toolchain '{"pins": {"MNN": "3.6.0"}}' --out .toolchains/mnn-3.6.0"""))
def toolchain(
    asked: Annotated[str, typer.Argument(help="What config.yaml has under toolchains.NAME, JSON: pins, others.")],
    out: Out,
    requirements: Annotated[Path, typer.Option(help="Pins of the packages that are not asked for.")] = Path(
        "requirements.txt"
    ),
) -> None:
    """Make an environment with other releases of the tools; its bin/hf2mnn runs every stage with them."""
    from hf2mnn.config import Toolchain, parse_json
    from hf2mnn.toolchain import make_toolchain

    make_toolchain(out, requirements, Toolchain(**parse_json(Toolchain, asked, "TOOLCHAIN")))


@app.command(epilog=_example("hf2mnn summarize results/*/summary.csv --out results/summary.csv"))
def summarize(
    tables: Annotated[list[Path], typer.Argument(help="The models' summary.csv.")],
    out: Annotated[Path, typer.Option("--out", help="The joined table, csv.")],
) -> None:
    """Join the models' tables."""
    from hf2mnn.report.table import join_tables

    join_tables(tables, out)


@app.command(epilog=_example("hf2mnn table results/summary.csv"))
def table(path: Annotated[Path, typer.Argument(help="A summary.csv.")]) -> None:
    """Print a comparison, and say where the pages lie."""
    from hf2mnn.report.changes import PAGE
    from hf2mnn.report.console import print_table
    from hf2mnn.report.table import read_table

    frame = read_table(path)
    print_table(frame)
    for model in frame["model"].unique():
        page = path.parent / model / "report.html"
        if page.exists():
            print(f"report: {page}")
        if (changes := page.with_name(PAGE)).exists():
            print(f"\n{changes.read_text(encoding='utf-8')}")


@app.command(epilog=_example("hf2mnn stages results"))
def stages(folder: Annotated[Path, typer.Argument(help="The folder that holds a folder for each model.")]) -> None:
    """Print what each stage took: time, memory, and what it wrote."""
    from hf2mnn.report.stages import print_stages

    print_stages(folder)


@app.command(epilog=_example("hf2mnn gates results/summary.csv --out results/gates.txt"))
def gates(
    path: Annotated[Path, typer.Argument(help="A summary.csv.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write when every required row keeps its gates.")
    ] = None,
) -> None:
    """Fail where a required row misses a gate."""
    from hf2mnn.files import whole_file
    from hf2mnn.report.table import missed_gates, read_table

    frame = read_table(path)
    missed = missed_gates(frame)
    if missed:
        raise GateError(f"{len(missed)} required of {len(frame)} rows miss their gates: {' | '.join(missed)}")
    if out:
        with whole_file(out) as partial:
            partial.write_text(f"{int(frame['required'].sum())} required rows keep their gates\n")


@app.command(epilog=_example("hf2mnn verify results/shapes-vl/mnn/int4"))
def verify(
    folders: Annotated[list[Path], typer.Argument(help="Bundles, or folders of any stage.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read every byte of bundles, or of any stage's folder, and say whether they are those that were made. Needs no
    network and no other folder."""
    from hf2mnn.verify import print_verdicts, verify_folder

    verdicts = [verify_folder(folder) for folder in folders]
    print_verdicts(verdicts, as_json)
    if not all(verdict.whole for verdict in verdicts):
        raise typer.Exit(1)


@app.command(epilog=_example('hf2mnn ask results/shapes-vl/mnn/int4 --image cat.png "What is this?"'))
def ask(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask about; give it again for more.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    conversation: Annotated[
        Path | None, typer.Option(help="A JSON file of messages, in place of a prompt; its last one is answered.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    threads: Annotated[int, typer.Option(help="Threads; 0 for the bundle's own number.", min=0)] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)] = 600,
    as_called: Annotated[
        bool, typer.Option("--as-called", help="Leave template, image size and positions to the engine.")
    ] = False,
) -> None:
    """Ask a finished bundle something, in MNN's engine."""
    from hf2mnn.mnn.ask import ask_bundle, continue_conversation, read_conversation

    if (prompt is None) == (conversation is None):
        raise Hf2mnnError("give either a prompt or --conversation FILE")
    if conversation and (image or system):
        raise Hf2mnnError("a conversation brings its pictures and system prompt along; leave out --image and --system")
    options = {"threads": threads, "time_limit": time_limit, "as_called": as_called}
    if conversation:
        print(continue_conversation(bundle, *read_conversation(conversation), max_new_tokens, **options))
    else:
        print(ask_bundle(bundle, prompt, image or [], max_new_tokens, system, **options))


@app.command(epilog=_example("hf2mnn doctor results/shapes-vl/mnn/int4 --checkpoint results/shapes-vl/source"))
def doctor(
    path: Annotated[
        Path, typer.Argument(help="A bundle's folder, a .mnn or .onnx file, or a folder of the onnx or mnn stage.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint that it was made of: to compare with.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of the reference stage: for ranges of values.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also load the bundle in the engine and ask it something.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="What --run asks.")] = "What is the capital of France?",
    time_limit: Annotated[float, typer.Option(help="Seconds after which --run stops the engine.", min=1)] = 300,
) -> None:
    """Find out from its files why a bundle talks nonsense, crashes or is slow; whoever made it.

    Exit code 0: nothing, or advice only; 3: warnings; 4: errors; 1: it could not be examined.
    """
    from hf2mnn.doctor.examine import by_severity, look_at
    from hf2mnn.doctor.show import as_json as to_json
    from hf2mnn.doctor.show import as_text, exit_code

    seen = look_at(path, checkpoint, reference)
    if run and seen.bundle is None:
        raise Hf2mnnError(f"--run asks a bundle, and {path} is another thing ({seen.kind}); give the bundle's folder")
    if run:
        from hf2mnn.doctor.run import run_bundle

        seen.findings = by_severity([*seen.findings, *run_bundle(seen.bundle, prompt, time_limit)])
        seen.checks.append("run_bundle")
    print(to_json(seen) if as_json else as_text(seen))
    raise typer.Exit(exit_code(seen.findings))


@app.command(
    epilog=_example(
        "hf2mnn speed --bundle fp16=results/shapes-vl/mnn/fp16 --bundle int4=results/shapes-vl/mnn/int4"
        " --baseline fp16 --out results/shapes-vl/speed"
    )
)
def speed(
    out: Out,
    bundle: Annotated[list[str], typer.Option(help="NAME=FOLDER of a bundle; give it again for more.")],
    baseline: Annotated[str, typer.Option(help="Name of the bundle that the others are compared with.")],
    repeats: Annotated[int, typer.Option(help="Processes to time each bundle with, in turns.", min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Length of the answer.", min=1)] = 64,
    picture_side: Annotated[int, typer.Option(help="Sides of the picture in pixels.", min=1)] = 224,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens in the KV cache when its worth is measured; again for more.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 for all cores.", min=0)] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds after which one process is stopped.", min=1)] = 7200,
) -> None:
    """Time bundles of one model against each other, and measure their memory and what the KV cache is worth."""
    import json

    from hf2mnn.evaluate.speed import LENGTHS, SUMMARY, measure_speed, parse_bundles
    from hf2mnn.report.speed import print_speed

    measure_speed(
        parse_bundles(bundle),
        baseline,
        out,
        repeats,
        prompt_tokens,
        answer_tokens,
        threads,
        picture_side,
        sorted(set(length or LENGTHS)),
        time_limit,
    )
    print_speed(json.loads((out / SUMMARY).read_text()))


@app.command(epilog=_example("hf2mnn tune results/shapes-vl/mnn/int4 --dry-run"))
def tune(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Try only this: thread_num, precision, memory, attention_mode, dynamic_option; again for more."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a typical prompt.", min=1)] = 256,
    answer_tokens: Annotated[int, typer.Option(help="Length of a typical answer.", min=1)] = 64,
    picture_side: Annotated[int, typer.Option(help="Sides of its picture in pixels.", min=1)] = 224,
    repeats: Annotated[int, typer.Option(help="Processes to time each setting with, in turns.", min=1)] = 5,
    max_kld: Annotated[
        float | None,
        typer.Option(
            help="Largest mean KL divergence from the bundle's most exact settings; left out, that of the present"
            " settings or 0.001, whichever is larger.",
            min=0,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which one process is stopped.", min=1)] = 7200,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write nothing.")] = False,
) -> None:
    """Find the engine's fastest settings for a bundle on this machine, and write them into its config.json."""
    from hf2mnn.evaluate.tune import SETTINGS, tune_bundle
    from hf2mnn.report.speed import print_tuned

    tuned = tune_bundle(
        bundle,
        setting or SETTINGS,
        prompt_tokens,
        answer_tokens,
        picture_side,
        repeats,
        max_kld,
        time_limit,
        dry_run,
    )
    print_tuned(tuned, written=not dry_run)


@app.command(epilog=_example("hf2mnn synth --like qwen2-vl-2b --tokenizer models/shapes-vl --out /data/synthetic-2b"))
def synth(
    out: Out,
    like: Annotated[
        str,
        typer.Option(
            help="Shape of a real model: qwen2-vl-2b, qwen2.5-vl-3b, qwen3-vl-2b, qwen3-0.6b, llama-3.2-1b, ..."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder whose tokenizer, template and processor settings are taken.")
    ] = None,
    shards: Annotated[int, typer.Option(help="safetensors files.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Which random weights.")] = 0,
) -> None:
    """Make a checkpoint of a real model's shape with random weights, to try scale where none can be downloaded."""
    from hf2mnn.source.synth import make_checkpoint_like

    make_checkpoint_like(like, out, seed, shards, tokenizer)


@app.command(epilog=_example("hf2mnn schema > workflow/schemas/config.schema.yaml"))
def schema() -> None:
    """Print the JSON schema of config.yaml, as YAML."""
    import yaml

    from hf2mnn.config import config_schema

    print(yaml.safe_dump(config_schema(), sort_keys=False, allow_unicode=True, width=120), end="")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf2mnn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _of_file(error: Exception) -> str | None:
    """A file that is missing, a folder, no folder..., by its name; None for an error that is no file's."""
    if not isinstance(error, OSError):
        return None
    name = error.filename2 or error.filename
    return f"{name}: {error.strerror}" if name else str(error)


class _Stopped(SystemExit):
    """By a signal; the code is 128 and its number."""


def _stop(number: int, _: object) -> None:
    """End as by an exception: children are stopped, and what is half-made is removed."""
    name = signal.Signals(number).name
    os.write(2, f"hf2mnn: stopped ({name}); the same command again starts this stage from its beginning\n".encode())
    raise _Stopped(128 + number)


def _again(number: int, _: object) -> None:
    raise _Stopped(128 + number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """Python prints and forgets what is raised while it frees an object. A signal that comes just then (a tracing torch
    frees a great many) must end the stage all the same."""
    if not isinstance(lost.exc_value, _Stopped):
        sys.__unraisablehook__(lost)
        return
    number = lost.exc_value.code - 128
    signal.signal(number, _again)  # which says nothing: it has been said
    threading.Timer(0.01, signal.pthread_kill, [threading.main_thread().ident, number]).start()


def main() -> None:
    """Expected failures end with one line on stderr and exit code 1."""
    sys.unraisablehook = _stop_again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _stop)
    # OpenMP threads that spin while they wait make torch 17 times slower as soon as another job shares the cores
    # (measured: 143 ms a token against 8); its library reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # Bars of transformers and others would fill a log with lines that are drawn over themselves.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except Hf2mnnError as error:
        print(f"hf2mnn: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        said = sentence(error, Path.cwd()) or _of_file(error)
        if said is None:
            raise
        print(f"hf2mnn: {said}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
