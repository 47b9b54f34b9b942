"""benchmark: bundles -> a row for each run and measure, their medians and ratios, and the gain of the KV cache."""

from __future__ import annotations

from typing import Annotated

import typer

from hf2mnn.core.errors import ConfigError
from hf2mnn.core.options import Out
from hf2mnn.core.stage import Footprint, Stage, open_stage
from hf2mnn.machine.hardware import cores

STAGE = Stage("benchmark", tools=("MNN", "numpy"), footprint=Footprint(1500, 4.2, 60, 240))


def run(
    bundles: Annotated[list[str], typer.Option("--bundle", help="NAME=FOLDER of a bundle; repeat for more.")],
    baseline: Annotated[str, typer.Option(help="Name of the bundle that the others are compared with.")],
    destination: Out,
    repeats: Annotated[int, typer.Option(help="Processes to time each bundle with, interleaved.", min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.", min=1)] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Length of the answer in tokens.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 for all cores.", min=0)] = 0,
    image_side: Annotated[int, typer.Option(help="Width and height of the image in pixels.", min=1)] = 224,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", help="Tokens in the KV cache when its gain is measured; repeat for more.", min=1),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which one process is stopped.", min=1)] = 7200,
) -> None:
    """Time bundles of one model against each other, and measure their memory and the gain of the KV cache.

    Example: hf2mnn benchmark --bundle fp16=results/shapes-vl/bundles/fp16 --bundle int4=results/shapes-vl/bundles/int4
        --baseline fp16 --out results/shapes-vl/benchmark
    """
    from hf2mnn.evaluation.benchmark import LENGTHS, check_bundles, parse_bundles, write_benchmark
    from hf2mnn.report.console import print_speed

    parsed = parse_bundles(bundles)
    if baseline not in parsed:
        raise ConfigError(f"--baseline: there is no bundle {baseline!r}; there are {', '.join(parsed)}")
    checked = check_bundles(parsed)
    options = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "image_side": image_side}
    options["lengths"] = sorted(set(LENGTHS if lengths is None else lengths))
    chosen = {"baseline": baseline, "repeats": repeats, "threads": threads or cores(), **options}
    with open_stage(STAGE, destination, checked, chosen) as stage:
        folders = {name: bundle.folder for name, bundle in checked.items()}
        sizes = {name: sum(entry["size"] for entry in bundle.outputs.values()) for name, bundle in checked.items()}
        summary = write_benchmark(folders, sizes, chosen, stage.folder, time_limit)
        stage.results["machine"] = summary["machine"]
    print_speed(summary)
