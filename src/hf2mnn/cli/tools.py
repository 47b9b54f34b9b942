"""Commands beside the stages: pins, toolchains, tables, and tools for a finished bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.errors import GateError, Hf2mnnError
from hf2mnn.core.options import Hub, Out, Revision

app = typer.Typer()


@app.command(epilog="Example: hf2mnn pin Qwen/Qwen2-VL-2B-Instruct --revision main --out qwen2-vl-2b.json")
def pin(
    repository: Annotated[str, typer.Argument(help="owner/name on a hub.")],
    revision: Revision = None,
    hub: Hub = "huggingface",
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the commit with its files' sizes and hashes, JSON.")
    ] = None,
) -> None:
    """Print the present commit of a branch or tag, for config.yaml; nothing is downloaded."""
    from hf2mnn.checkpoint.hub.download import pin_repository

    pinned = pin_repository(repository, revision, hub)
    if out:
        pinned.save(out)
    print(pinned.revision)


@app.command(epilog="""Example: hf2mnn toolchain '{"pins": {"MNN": "3.6.0"}}' --out .toolchains/mnn-3.6.0""")
def toolchain(
    asked: Annotated[str, typer.Argument(help="Value of toolchains.NAME in config.yaml, JSON: pins, others.")],
    out: Out,
    requirements: Annotated[Path, typer.Option(help="Pins of all other packages.")] = Path("requirements.txt"),
) -> None:
    """Create an environment with other releases of the tools; its bin/hf2mnn runs every stage with them."""
    from hf2mnn.config.load import parse_option
    from hf2mnn.config.models import Toolchain
    from hf2mnn.config.toolchain import make_toolchain

    make_toolchain(out, requirements, Toolchain(**parse_option(Toolchain, asked, "TOOLCHAIN")))


@app.command(epilog="Example: hf2mnn summarize results/*/summary.csv --out results/summary.csv")
def summarize(
    tables: Annotated[list[Path], typer.Argument(help="summary.csv of each model.")],
    out: Annotated[Path, typer.Option("--out", help="The joined table, csv.")],
) -> None:
    """Join the tables of several models."""
    from hf2mnn.report.table import join_tables

    join_tables(tables, out)


@app.command(epilog="Example: hf2mnn table results/summary.csv")
def table(path: Annotated[Path, typer.Argument(help="A summary.csv.")]) -> None:
    """Print a comparison, and the paths of the reports."""
    from hf2mnn.cli.run_messages import print_summary

    print_summary(path)


@app.command(epilog="Example: hf2mnn resources results")
def resources(folder: Annotated[Path, typer.Argument(help="Folder with a folder for each model.")]) -> None:
    """Print time, memory and bytes written of each stage."""
    from hf2mnn.report.console import print_stages
    from hf2mnn.stages import ORDER

    print_stages(folder, ORDER)


@app.command(epilog="Example: hf2mnn gates results/summary.csv --out results/gates.txt")
def gates(
    path: Annotated[Path, typer.Argument(help="A summary.csv.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write when every required variant passes its gates.")
    ] = None,
) -> None:
    """Exit with code 1 if a required variant misses a gate."""
    from hf2mnn.core.files import atomic_file
    from hf2mnn.report.table import missed_gates, read_table

    frame = read_table(path)
    missed = missed_gates(frame)
    if missed:
        raise GateError(f"{len(missed)} required of {len(frame)} variants miss their gates: {' | '.join(missed)}")
    if out:
        with atomic_file(out) as partial:
            partial.write_text(f"{int(frame['required'].sum())} required variants pass their gates\n")


@app.command(epilog="Example: hf2mnn verify results/shapes-vl/bundles/int4")
def verify(
    folders: Annotated[list[Path], typer.Argument(help="Bundles, or folders of other stages.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare every byte of a bundle, or of another stage's folder, with its manifest.

    It needs no network and no other folder. Edited run-time settings of a bundle are named, and are no damage.
    """
    from hf2mnn.core.verify import print_verdicts
    from hf2mnn.mnn.bundle_config import verify_bundle

    verdicts = [verify_bundle(folder) for folder in folders]
    print_verdicts(verdicts, as_json)
    if not all(verdict.intact for verdict in verdicts):
        raise typer.Exit(1)


@app.command(epilog='Example: hf2mnn ask results/shapes-vl/bundles/int4 --image cat.png "What is this?"')
def ask(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    prompt: Annotated[str | None, typer.Argument(help="Question to the model.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image of the question; repeat for more.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    conversation: Annotated[
        Path | None, typer.Option(help="JSON file of messages, in place of a prompt; the last one is answered.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with a list of tools, for a chat template that writes them.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens; 0 for the number in the bundle.", min=0)
    ] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 for the number in the bundle.", min=0)] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds after which the engine is stopped.", min=1)] = 600,
    as_called: Annotated[
        bool, typer.Option("--as-called", help="Leave template, image size and positions to the engine.")
    ] = False,
) -> None:
    """Ask a bundle a question in MNN's engine."""
    from hf2mnn.mnn.ask import ask_bundle, continue_conversation, read_conversation, read_tools

    if (prompt is None) == (conversation is None):
        raise Hf2mnnError("give either a prompt or --conversation FILE")
    if conversation and (image or system):
        raise Hf2mnnError("--conversation has its own images and system prompt: leave out --image and --system")
    options = {"threads": threads, "time_limit": time_limit, "as_called": as_called}
    options["tools"] = read_tools(tools) if tools else None
    if conversation:
        print(continue_conversation(bundle, *read_conversation(conversation), max_new_tokens, **options))
    else:
        print(ask_bundle(bundle, prompt, image or [], max_new_tokens, system, **options))


@app.command(epilog="Example: hf2mnn doctor results/shapes-vl/bundles/int4 --checkpoint results/shapes-vl/checkpoint")
def doctor(
    path: Annotated[
        Path, typer.Argument(help="A bundle's folder, a .mnn or .onnx file, or a folder of the onnx or mnn stage.")
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of its checkpoint, to compare with.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of the reference stage, for ranges of values.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also load the bundle in the engine and ask it a question.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="Question of --run.")] = "What is the capital of France?",
    time_limit: Annotated[float, typer.Option(help="Seconds after which --run stops the engine.", min=1)] = 300,
) -> None:
    """Find the causes of wrong output, crashes or low speed in the files of a bundle of any origin.

    Exit code 0: no finding, or advice only; 3: warnings; 4: errors; 1: it cannot be examined.
    """
    from hf2mnn.doctor.examine import examine

    examination = examine(path, checkpoint, reference)
    if run and examination.bundle is None:
        raise Hf2mnnError(f"--run needs a bundle, and {path} is of another kind ({examination.kind}): give its folder")
    if run:
        from hf2mnn.doctor.run import run_bundle

        examination.add("run_bundle", run_bundle(examination.bundle, prompt, time_limit))
    print(examination.to_json() if as_json else examination.to_text())
    raise typer.Exit(examination.exit_code)


@app.command(epilog="Example: hf2mnn tune results/shapes-vl/bundles/int4 --dry-run")
def tune(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Try only this: thread_num, precision, memory, attention_mode, dynamic_option; repeat for more."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a typical prompt in tokens.", min=1)] = 256,
    answer_tokens: Annotated[int, typer.Option(help="Length of a typical answer in tokens.", min=1)] = 64,
    image_side: Annotated[int, typer.Option(help="Width and height of its image in pixels.", min=1)] = 224,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each setting.", min=1)] = 5,
    max_kld: Annotated[
        float | None,
        typer.Option(
            help="Largest mean KL divergence from the most exact settings; by default that of the present settings, at"
            " least 0.001.",
            min=0,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which one process is stopped.", min=1)] = 7200,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure only, and write nothing.")] = False,
) -> None:
    """Find the engine's fastest settings for a bundle on this machine, and write them into its config.json."""
    from hf2mnn.evaluation.tune import SETTINGS, tune_bundle
    from hf2mnn.report.console import print_tuned

    lengths = (prompt_tokens, answer_tokens, image_side)
    tuned = tune_bundle(bundle, setting or SETTINGS, *lengths, repeats, max_kld, time_limit, dry_run)
    print_tuned(tuned, written=not dry_run)


@app.command(epilog="Example: hf2mnn schema > workflow/schemas/config.schema.yaml")
def schema() -> None:
    """Print the JSON schema of config.yaml, as YAML."""
    import yaml

    from hf2mnn.config.schema import Config

    print(yaml.safe_dump(Config.model_json_schema(), sort_keys=False, allow_unicode=True, width=120), end="")
