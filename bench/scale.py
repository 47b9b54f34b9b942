"""Convert a model of Qwen2-VL-2B's shape end to end with hf2mnn and with MNN's llmexport, and compare both.

The checkpoint has the model's shape, names and layout, and random weights (`bench/synth.py`); it is kept.

    hf2mnn       fetch, export, convert, and quantize for each bundle: one process each, from and to the disk
    llmexport    one process, which converts and quantizes, and the converter that it starts

"int4 rtn" has the same formats as llmexport: round to nearest, the decoder with 4 bits in blocks of 64, the vision
tower with 4 bits in blocks of 128, and for a tied model the embedding in lm_head. "int4" and "int8" are the defaults of
hf2mnn: scale search by mean squared error, the vision tower with 8 bits, the embedding in a bfloat16 file. "total" is
the sum of all steps from the checkpoint to one bundle, and the maximum of their peaks.

scale.csv: one row for each tool and step, medians over repeats; `Usage` in process_usage.py describes its columns.
Before each repeat of a tool, the checkpoint and the tool's libraries are read once, so that both tools start with them
in memory; before each step, pending writes are flushed to the disk. Linux only.

engine.csv: one row for each bundle and figure of MNN.llm: median, lowest and highest value over rounds, and ratio, the
median over rounds of the ratio to llmexport's bundle. A round runs every bundle once, interleaved, each in its own
process, with the same settings and tokens: load_s, then 512 tokens in and 64 out, and in the first rounds an image of
420 x 420 pixels (image_s: from pixels to embeddings). peak_rss_mb is the peak of the process before the image.

Measurements are kept and reused while code, tools and machine are the same, so that an interrupted bench continues.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn.checkpoint.size import check_disk
from hf2mnn.core.errors import Hf2mnnError, MachineError
from hf2mnn.core.files import CHUNK, atomic_file
from hf2mnn.core.manifest import tool_versions
from hf2mnn.evaluation.benchmark import interleaved
from hf2mnn.machine.hardware import available_memory, cores, describe_machine
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.engine_facts import SETTING_DEFAULTS
from process_usage import run_measured
from scale_steps import (
    HF2MNN,
    INT4,
    LLM_FILES,
    LLMEXPORT,
    MATCHED,
    STEPS,
    VARIANTS,
    Step,
    checkpoint_size,
    describe_llmexport,
    hf2mnn_steps,
    llmexport_steps,
)

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "models" / "shapes-vl"
DEFAULT_SHAPE = "qwen2-vl-2b"

COLUMNS = ["tool", "step", "wall_s", "cpu_s", "peak_rss_mb", "bytes_written"]
ENGINE_COLUMNS = ["bundle", "figure", "median", "low", "high", "ratio", "rounds"]
FIGURES = ["load_s", "prefill_tokens_s", "decode_tokens_s", "peak_rss_mb", "image_s"]

PROMPT, ANSWER, IMAGE, IMAGE_ROUNDS = 512, 64, 420, 2
"""Tokens of prompt and answer, side of the image in pixels, and rounds with an image."""
LLM_MEMORY = 4.2
"""Memory of llmexport relative to a bfloat16 checkpoint (18.1 GB for 4.4 GB, measured): it holds two float32 copies."""
DISK = {HF2MNN: 1.6, LLMEXPORT: 3.0}
"""Upper bound of the bytes that a tool writes, relative to the checkpoint."""
LOCK = Path(tempfile.gettempdir()) / f"hf2mnn-bench-{os.getuid()}.lock"

# Numba compiles, or loads compiled code, before the measurement: that is not part of a conversion.
WARM_UP_HF2MNN = """
import numpy, onnxscript, torch, transformers, MNN
from hf2mnn.quant.blob import pack
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.rounding import round_rows
rows = numpy.ones((8, 16), numpy.float32)
for bits in (4, 8):
    for method in ("rtn", "mse"):
        pack(round_rows(rows, WeightFormat(bits, 16, method=method)).q, bits)
"""
WARM_UP_LLMEXPORT = "import onnx, torch, transformers, MNN"


# Stored measurements, and the tables of them.


class Records:
    """Measurements of a shape below `folder`/scale-rows: one file for each step and repeat, and for each round."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder, shape

    def _path(self, name: str) -> Path:
        return self.folder / "scale-rows" / self.shape / f"{name.replace(' ', '-')}.json"

    def get(self, name: str, circumstances: dict[str, Any]) -> dict[str, Any] | None:
        """Return the measurement if it was taken under these circumstances."""
        path = self._path(name)
        record = json.loads(path.read_text()) if path.is_file() else {}
        return record.get("figures") if record.get("circumstances") == circumstances else None

    def put(self, name: str, circumstances: dict[str, Any], figures: dict[str, Any]) -> None:
        """Store a measurement."""
        with atomic_file(self._path(name)) as path:
            path.write_text(json.dumps({"figures": figures, "circumstances": circumstances}, indent=1) + "\n")

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as csv next to the measurements."""
        suffix = "" if self.shape == DEFAULT_SHAPE else f"-{self.shape}"
        with atomic_file(self.folder / f"{name}{suffix}.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Return scale.csv: medians over repeats, and the totals of each bundle of hf2mnn.

    Args:
        runs: COLUMNS and `repeat`.
    """
    shared, tables = (runs["tool"] == HF2MNN) & runs["step"].isin(STEPS), [runs]
    for step in [step for step in runs["step"].unique() if step.startswith("quantize ")]:
        steps = runs[shared | (runs["step"] == step)].groupby("repeat")
        total = steps[["wall_s", "cpu_s", "bytes_written"]].sum().join(steps["peak_rss_mb"].max())
        total = total[steps["step"].count() == len(STEPS) + 1].reset_index()
        tables.append(total.assign(tool=HF2MNN, step=f"total {step.removeprefix('quantize ')}"))
    table = pd.concat(tables, ignore_index=True)
    table = table.groupby(["tool", "step"], sort=False)[COLUMNS[2:]].median().reset_index()
    table["bytes_written"] = table["bytes_written"].round().astype(int)
    return table.sort_values("tool", key=lambda tools: tools == LLMEXPORT, kind="stable")[COLUMNS]


def summarize_engine(rounds: list[dict[str, dict[str, float]]]) -> pd.DataFrame:
    """Return engine.csv; each round holds figures by bundle."""
    rows = []
    for bundle in rounds[0]:
        for figure in FIGURES:
            measured = [entry for entry in rounds if figure in entry[bundle]]
            if not measured:
                continue
            values = [entry[bundle][figure] for entry in measured]
            base = [entry.get(LLMEXPORT, {}).get(figure, np.nan) for entry in measured]
            ratio = float(np.median(np.divide(values, base)))
            rows.append((bundle, figure, np.median(values), min(values), max(values), ratio, len(measured)))
    return pd.DataFrame(rows, columns=ENGINE_COLUMNS)


# Running both tools and the engine.


def read_once(folder: Path) -> None:
    """Read all files of a folder, so that the system caches them as far as memory allows."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            while file.read(CHUNK):
                pass


@contextmanager
def exclusive(path: Path = LOCK) -> Iterator[None]:
    """Hold a lock while llmexport runs: most machines have no memory for two.

    Raises:
        MachineError: Another bench holds the lock.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MachineError("another bench runs llmexport on this machine: wait until it ends") from None
        yield


def check_room(checkpoint: Path, root: Path, tools: Collection[str]) -> None:
    """Check disk and memory before anything is measured.

    Raises:
        Hf2mnnError: The disk or the memory is too small.
    """
    size = checkpoint_size(checkpoint)
    if not tools:
        return
    check_disk(root, int(sum(DISK[tool] for tool in tools) * size), " and ".join(tools))
    needed, free = LLM_MEMORY * size, available_memory()
    if LLMEXPORT in tools and free < needed:
        raise MachineError(
            f"llmexport needs {needed / 1e9:.0f} GB of memory for {checkpoint}, and {free / 1e9:.0f} GB are free: end"
            " other programs, or leave it out with --only hf2mnn"
        )


@dataclass
class ToolRuns:
    """Steps of one tool, measured once for each repeat.

    Attributes:
        steps: The steps in order.
        records: Stored measurements.
        circumstances: Machine and checkpoint.
        logs: Folder for the output of the steps.
    """

    steps: list[Step]
    records: Records
    circumstances: dict[str, Any]
    logs: Path

    def _name(self, step: Step, repeat: int) -> str:
        return f"{step.tool} {step.name} {repeat}"

    def _record(self, step: Step, repeat: int) -> dict[str, Any] | None:
        return self.records.get(self._name(step, repeat), {**self.circumstances, "code": step.code})

    def missing(self, repeat: int) -> list[Step]:
        """Return the steps that are not measured, or whose folder is missing."""
        return [step for step in self.steps if not step.folder.is_dir() or self._record(step, repeat) is None]

    def run(self, step: Step, repeat: int) -> None:
        """Measure a step.

        Raises:
            Hf2mnnError: The step failed.
        """
        name = self._name(step, repeat)
        print(f"{name}: ", end="", flush=True)
        shutil.rmtree(step.folder, ignore_errors=True)  # first, so that the disk never holds it twice
        os.sync()  # pending writes of other steps must not slow this one down
        log, environment = self.logs / f"{name.replace(' ', '-')}.log", {**os.environ, "HF_HUB_OFFLINE": "1"}
        usage = run_measured(step.command, log, cwd=step.folder.parent, env=environment)
        if step.tool == LLMEXPORT and (missing := [file for file in LLM_FILES if not (step.folder / file).is_file()]):
            raise Hf2mnnError(f"llmexport wrote no {', '.join(missing)}; see {log}")
        self.records.put(name, {**self.circumstances, "code": step.code}, asdict(usage))
        print(f"{usage.wall_s} s, {usage.peak_rss_mb:.0f} MB", flush=True)

    def rows(self, repeat: int) -> list[dict[str, Any]]:
        """Return the measurements of a repeat as rows with COLUMNS and `repeat`."""
        return [
            {"tool": step.tool, "step": step.name, "repeat": repeat, **self._record(step, repeat)}
            for step in self.steps
        ]


def random_text(checkpoint: Path, count: int) -> list[int]:
    """Draw token ids of ordinary text: no special tokens of template, image or stop."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    ordinary = sorted(set(tokenizer["model"]["vocab"].values()) - special)
    return [int(token) for token in np.random.default_rng(0).choice(ordinary, count)]


def bundle_identity(folder: Path) -> str:
    """Return a digest of names, sizes and times of a bundle's files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode()).hexdigest()


def time_engine(
    bundles: dict[str, Path], ids: list[int], rounds: int, threads: int, records: Records, circumstances: dict
) -> list[dict[str, dict[str, float]]]:
    """Return figures by bundle for each round; stored rounds of the same bundles are reused."""
    settings = {**SETTING_DEFAULTS, "thread_num": threads, "precision": "low", "memory": "low", "backend_type": "cpu"}
    settings |= {"sampler_type": "greedy", "reuse_kv": False}
    program = hashlib.sha256(Path(__file__).with_name("scale_engine.py").read_bytes()).hexdigest()
    identities = {name: bundle_identity(folder) for name, folder in bundles.items()}
    circumstances = {**circumstances, "settings": settings, "program": program, "bundles": identities}
    order, results = interleaved(list(bundles), rounds), []
    for number in range(rounds):
        figures = records.get(f"engine {number}", circumstances)
        if figures is None:
            figures = {}
            for name in [name for repeat, name in order if repeat == number]:
                print(f"engine {number} {name}: ", end="", flush=True)
                read_once(bundles[name])
                image = IMAGE if number < IMAGE_ROUNDS else 0
                figures[name] = time_bundle(bundles[name], settings, ids, image)
                print(", ".join(f"{key} {value:.4g}" for key, value in figures[name].items()), flush=True)
            records.put(f"engine {number}", circumstances, figures)
        # Each round starts with another bundle; the table has them in their own order.
        results.append({name: figures[name] for name in bundles})
    return results


def time_bundle(bundle: Path, settings: dict[str, Any], ids: list[int], image: int) -> dict[str, float]:
    """Return the figures of one bundle in one round."""
    with tempfile.TemporaryDirectory(prefix="hf2mnn-bench-") as folder:
        result = Path(folder, "result.json")
        job = {"bundle": str(bundle.resolve()), "settings": settings, "prompt": ids[:PROMPT], "answer": ids[PROMPT:]}
        run_worker("scale_engine", {**job, "image": image, "result": str(result)}, time_limit=3600)
        return json.loads(result.read_text())


def print_markdown(title: str, table: pd.DataFrame, forms: dict[str, str]) -> None:
    """Print a table for docs/benchmarks/scale.md."""
    texts = table.copy()
    for column, form in forms.items():
        texts[column] = ["" if pd.isna(value) else form.format(value) for value in table[column]]
    align = ["left" if column in ("tool", "step", "bundle", "figure") else "right" for column in table.columns]
    print(f"\n{title}\n\n{texts.to_markdown(index=False, colalign=align, disable_numparse=True)}")


def report(records: Records, runs: list[dict[str, Any]], repeats: int) -> None:
    """Write scale.csv and print it with the ratios of llmexport to hf2mnn."""
    table = summarize(pd.DataFrame(runs))
    records.write_table("scale", table)
    forms = {"wall_s": "{:.1f}", "cpu_s": "{:.1f}", "peak_rss_mb": "{:.0f}", "bytes_written": "{:,}"}
    print_markdown(f"{records.shape}, {f'medians of {repeats} runs' if repeats > 1 else 'one run'}", table, forms)
    totals = table.set_index(["tool", "step"])[COLUMNS[2:]]
    keys = (HF2MNN, f"total {MATCHED}"), (LLMEXPORT, "total")
    if all(key in totals.index for key in keys):
        ratios = totals.loc[keys[1]] / totals.loc[keys[0]]
        print(f"\nllmexport over hf2mnn's total {MATCHED}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def report_engine(records: Records, rounds: list[dict[str, dict[str, float]]]) -> None:
    """Write engine.csv and print it."""
    table = summarize_engine(rounds)
    records.write_table("engine", table)
    forms = dict.fromkeys(("median", "low", "high"), "{:.4g}") | {"ratio": "{:.3f}"}
    print_markdown(f"{records.shape}, in MNN.llm", table, forms)


def bench(args: argparse.Namespace) -> None:
    """Run the bench.

    Raises:
        Hf2mnnError: A tool is missing or failed, or the machine is too small.
    """
    shape = args.checkpoint.name if args.checkpoint else args.like
    root = (args.work or args.out / f"scale-{shape}").resolve()
    root.mkdir(parents=True, exist_ok=True)
    records, tools = Records(args.out, shape), [args.only] if args.only else [HF2MNN, LLMEXPORT]
    llmexport = describe_llmexport(args.llmexport_python) if LLMEXPORT in tools else {"versions": {}}
    checkpoint = args.checkpoint.resolve() if args.checkpoint else root / "checkpoint"
    if not args.checkpoint and not (checkpoint / "manifest.json").is_file():
        program = [sys.executable, REPOSITORY / "bench" / "synth.py", "--like", shape, "--tokenizer", MODEL]
        if subprocess.run([*program, "--out", checkpoint]).returncode != 0:
            raise Hf2mnnError(f"bench/synth.py failed to write {checkpoint}")
    machine = describe_machine() | tool_versions("MNN")
    base = f"{hashlib.sha256((checkpoint / 'config.json').read_bytes()).hexdigest()[:16]} {checkpoint_size(checkpoint)}"
    circumstances = {name: machine[name] for name in ("cpu", "cores", "MNN")} | {"base": base}
    steps = {}
    if HF2MNN in tools:
        steps[HF2MNN] = hf2mnn_steps(checkpoint, root / HF2MNN, args.variant or VARIANTS, args.threads)
    if LLMEXPORT in tools:
        steps[LLMEXPORT] = llmexport_steps(checkpoint, root / LLMEXPORT, args.llmexport_python, llmexport)
    runs = {tool: ToolRuns(steps[tool], records, circumstances, root / "logs") for tool in tools}
    order = [(repeat, tool) for repeat in range(args.repeats) for tool in tools]
    unfinished = {tool for repeat, tool in order if runs[tool].missing(repeat)}
    check_room(checkpoint, root, [tool for tool in tools if tool in unfinished])
    warm_up = {HF2MNN: [sys.executable, "-c", WARM_UP_HF2MNN]}
    warm_up[LLMEXPORT] = [args.llmexport_python, "-c", WARM_UP_LLMEXPORT]
    with exclusive() if LLMEXPORT in unfinished else nullcontext():
        for repeat, tool in order:
            if missing := runs[tool].missing(repeat):
                (root / tool).mkdir(parents=True, exist_ok=True)
                subprocess.run(warm_up[tool], check=True, stdout=subprocess.DEVNULL)
                read_once(checkpoint)
                for step in missing:
                    runs[tool].run(step, repeat)
    report(records, [row for repeat, tool in order for row in runs[tool].rows(repeat)], args.repeats)
    folders = {step.name: step.folder for step in steps.get(HF2MNN, [])}
    bundles = {f"{HF2MNN} {variant}": folders.get(f"quantize {variant}") for variant in (MATCHED, INT4)}
    bundles |= {LLMEXPORT: steps[LLMEXPORT][0].folder} if LLMEXPORT in tools else {}
    bundles = {name: folder for name, folder in bundles.items() if folder}
    if args.rounds and bundles:
        ids = random_text(checkpoint, PROMPT + ANSWER)
        report_engine(records, time_engine(bundles, ids, args.rounds, args.threads, records, circumstances))
    print("\n" + ", ".join(f"{name} {value}" for name, value in (machine | llmexport["versions"]).items()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python bench/scale.py
  python bench/scale.py --like qwen2-vl-7b --only hf2mnn --variant int4 --rounds 0 --work /data/scale-7b
  python bench/scale.py --checkpoint models/shapes-vl --llmexport-python llmexport/bin/python""",
    )
    out = REPOSITORY / "results" / "bench"
    python = REPOSITORY / ".venv-llmexport" / "bin" / "python"
    parser.add_argument(
        "--like", default=DEFAULT_SHAPE, help=f"shape of the checkpoint to make; default: {DEFAULT_SHAPE}"
    )
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint to convert instead")
    parser.add_argument("--only", choices=[HF2MNN, LLMEXPORT], help="run one tool")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this bundle; repeat for more")
    parser.add_argument("--repeats", type=int, default=1, help="interleaved conversions by each tool; default: 1")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the engine, 0 for none; default: 5")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of quantize and the engine; default: all")
    parser.add_argument("--llmexport-python", type=Path, default=python, help="default: .venv-llmexport/bin/python")
    parser.add_argument("--out", type=Path, default=out, help="folder for the tables; default: results/bench")
    parser.add_argument("--work", type=Path, help="folder for checkpoint and bundles; default: scale-SHAPE in --out")
    parser.add_argument("--again", action="store_true", help="discard stored measurements")
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    # Not resolved: the interpreter of a virtual environment is a link, which identifies its packages.
    args.llmexport_python = args.llmexport_python.absolute()
    if args.again:
        shape = args.checkpoint.name if args.checkpoint else args.like
        shutil.rmtree(args.out / "scale-rows" / shape, ignore_errors=True)
    try:
        bench(args)
    except Hf2mnnError as error:
        sys.exit(f"bench/scale.py: {error}")


if __name__ == "__main__":
    main()
