"""Convert a model of Qwen2-VL-2B's shape from end to end, beside MNN's llmexport, in one run on one machine.

The checkpoint has the model's shape, names and layout, and random weights (`hf2mnn synth`); it is made once and kept.

    hf2mnn       source, onnx, mnn, and quantize for each bundle, each a process of the command line, each from disk
    llmexport    one process, which converts and quantizes; its own work and that of the converter that it starts

"int4 rtn" is like for like: llmexport rounds to nearest, the decoder with 4 bits in blocks of 64, the vision tower with
4 bits in blocks of 128, and reads the embedding of a tied model from lm_head; so does that bundle. "int4" and "int8"
are hf2mnn's own defaults: least squares, the vision tower with 8 bits, the embedding in a bfloat16 file. "total" is
from the checkpoint to the one bundle: the sums of its steps, and the largest of their peaks.

scale.csv: a row for each tool and step, the medians of all repeats.

    wall_s, cpu_s    from start to end, and time on all cores, of all processes of a step
    peak_rss_mb      the largest sum of VmRSS of all processes of a step that run at a time, looked at every 0.1 s, or
                     the largest VmHWM of one of them, if that is more (a short peak). Both count pages of mapped
                     files (a checkpoint that is mapped) while they are resident, and a page that two share twice.
                     1 MB is 1e6 bytes.
    bytes_written    what the kernel counts as written to a disk (write_bytes of /proc/PID/io): files that are deleted
                     again count, hard links do not, nor does what is written to a tmpfs

Before each tool's turn the checkpoint and the tool's libraries are read once, so that both start with them in memory;
before each step what is still to be written goes to the disk. Linux only.

engine.csv: a row for each bundle and figure of MNN.llm: the median, lowest and highest of all rounds, and ratio, the
median of the ratios to llmexport's within each round. A round runs every bundle once, in turns, each in a process of
its own, all with the same settings and tokens: load_s, then 512 tokens in, 64 out; and in the first rounds an image of
420 x 420 pixels (image_s: from pixels to embeddings). peak_rss_mb is that of the whole process, before the image.

What was measured on this machine with the present code and tools is kept, so that a bench that was cut off goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from hf2mnn.checkpoint.room import check_disk
from hf2mnn.core.errors import Hf2mnnError, MachineError
from hf2mnn.core.files import BLOCK, whole_file
from hf2mnn.core.fingerprint import fingerprint
from hf2mnn.evaluation.benchmark import turns
from hf2mnn.machine.hardware import cores, describe_machine
from hf2mnn.machine.memory import available_memory
from hf2mnn.mnn.engine import run_worker
from hf2mnn.mnn.settings import DEFAULTS

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "models" / "shapes-vl"
DEFAULT = "qwen2-vl-2b"
OURS, LLMEXPORT = "hf2mnn", "llmexport"
LIKE, OWN, EIGHT = "int4 rtn", "int4", "int8"
VARIANTS = (LIKE, OWN, EIGHT)

COLUMNS = ["tool", "step", "wall_s", "cpu_s", "peak_rss_mb", "bytes_written"]
ENGINE_COLUMNS = ["bundle", "figure", "median", "low", "high", "ratio", "rounds"]
FIGURES = ["load_s", "prefill_tokens_s", "decode_tokens_s", "peak_rss_mb", "image_s"]

EVERY = 0.1
"""Seconds between two looks at the memory of a step."""
PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND = 10.0
"""Seconds that processes which outlive their parent get to end."""
PROMPT, ANSWER, IMAGE, IMAGE_ROUNDS = 512, 64, 420, 2
LLM_BITS, LLM_BLOCK, LLM_VISION_BLOCK = 4, 64, 128
"""What llmexport 0.0.5 does when it is not told otherwise; the last is `Vision.quant_block` of its utils/vision.py."""
LLM_FILES = ("config.json", "llm.mnn", "llm.mnn.weight", "llm_config.json", "tokenizer.mtok", "visual.mnn")
MEMORY = 4.2
"""Bytes that llmexport needs for each byte of a bfloat16 checkpoint (18.1 GB for 4.4 GB, measured): it holds the model
in float32 twice."""
DISK = {OURS: 1.6, LLMEXPORT: 3.0}
"""Bytes that a tool writes, at most, for each byte of the checkpoint."""
LOCK = Path(tempfile.gettempdir()) / f"hf2mnn-bench-{os.getuid()}.lock"

WARM_OURS = """
import numpy, onnxscript, torch, transformers, MNN
from hf2mnn.quant.blob import pack
from hf2mnn.quant.rounding import round_rows
rows = numpy.ones((8, 16), numpy.float32)
for bits in (4, 8):
    for method in ("rtn", "mse"):
        pack(round_rows(rows, bits, 16, False, 16, method).levels, bits)
"""
"""Let numba compile, or read what it has compiled before: that is not part of a conversion."""
WARM_LLMEXPORT = "import onnx, torch, transformers, MNN"
VERSIONS = """
import json
from importlib.metadata import version
from importlib.util import find_spec
versions = {name: version(name) for name in ("llmexport", "transformers", "torch", "MNN")}
print(json.dumps({"folder": find_spec("llmexport").submodule_search_locations[0], "versions": versions}))
"""
CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
"""MNN's converter without the program `mnnconvert`, which installs packages and reports usage."""


# Measuring a process with all that it starts.


@dataclass
class Taken:
    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    bytes_written: int


class Watch(threading.Thread):
    """Looks every EVERY seconds at the memory of all processes that this one has started since."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = psutil.Process()
        self.others = set(self.own.children(recursive=True))
        self.peak, self.ended = 0, threading.Event()

    def processes(self) -> set[psutil.Process]:
        return set(self.own.children(recursive=True)) - self.others

    def run(self) -> None:
        while True:
            # A set: before it becomes another program, a process that was started shares the memory of its parent.
            spaces = {address_space(process.pid) for process in self.processes()}
            held = [[1024 * space.get(entry, 0) for entry in ("VmRSS", "VmHWM")] for space in map(dict, spaces)]
            self.peak = max([self.peak, sum(now for now, _ in held), *(most for _, most in held)])
            if self.ended.wait(EVERY):
                return


def address_space(pid: int) -> tuple[tuple[str, int], ...]:
    """What the kernel counts of the memory of a process, in kB of 1024 bytes; nothing when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ()
    return tuple((name, int(size)) for name, size in re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE))


def _cpu_seconds() -> float:
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return waited.ru_utime + waited.ru_stime


def _bytes_written() -> int:
    """Of this process and all that were waited for."""
    return int(re.search(r"^write_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def measured(command: Sequence[str | Path], log: Path, **options: Any) -> Taken:
    """Run a command to its end, and say what it and all that it has started took; what it says goes to `log`.

    The kernel adds time and bytes of a process to those of the one that waits for it; what nobody waits for (the shell
    of an `os.popen`) is left to this process, which waits for it here.

    Raises:
        Hf2mnnError: it failed.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    watch, cpu, written = Watch(), _cpu_seconds(), _bytes_written()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options
        )
        watch.start()
        try:
            code = process.wait()
            wall = time.monotonic() - started
        finally:
            watch.ended.set()
            watch.join()
            if process.poll() is None:
                process.kill()
                process.wait()
            _, left = psutil.wait_procs(watch.processes(), LEFT_BEHIND if process.returncode == 0 else 0)
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, LEFT_BEHIND)
    if code != 0:
        lines = log.read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise Hf2mnnError(f"{shlex.join(map(str, command[:3]))} ... failed ({how}); it said last, in {log}: {said}")
    return Taken(round(wall, 2), round(_cpu_seconds() - cpu, 2), round(watch.peak / 1e6, 1), _bytes_written() - written)


# The steps of both tools.


@dataclass(frozen=True)
class Step:
    """One row: `command` makes `folder`. `code` says what it depends on beside checkpoint and machine."""

    tool: str
    name: str
    command: tuple[str | Path, ...]
    folder: Path
    code: str


def read_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def weights_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in weights_of(checkpoint))


def formats(config: dict[str, Any]) -> dict[str, list[str]]:
    """Arguments of `hf2mnn quantize` for each variant."""
    width = config["vision_config"]["embed_dim"]
    block = next(block for block in (LLM_VISION_BLOCK, 64, 32, 16, 0) if not block or width % block == 0)
    nearest = {"bits": LLM_BITS, "block": LLM_BLOCK, "method": "rtn"}
    alike = ["--decoder", json.dumps(nearest), "--vision", json.dumps({**nearest, "block": block})]
    tied = ["--embedding", "lm_head"] if config.get("tie_word_embeddings") else []
    return {
        LIKE: [*alike, *tied],
        OWN: ["--decoder", json.dumps({"bits": 4, "block": 64})],
        EIGHT: ["--decoder", json.dumps({"bits": 8})],
    }


def own_steps(checkpoint: Path, root: Path, variants: Sequence[str], threads: int) -> list[Step]:
    program, arguments = Path(sys.executable).parent / "hf2mnn", formats(read_config(checkpoint))
    source, onnx, base = (root / name for name in ("source", "onnx", "base"))
    stages = [
        ("source", "source", ["--path", checkpoint], source),
        ("onnx", "onnx", [source], onnx),
        ("mnn", "mnn", [onnx], base),
    ]
    for variant in variants:
        given = [onnx, base, *arguments[variant], "--threads", str(threads)]
        stages.append((f"quantize {variant}", "quantize", given, root / variant.replace(" ", "-")))
    made, steps = "", []
    for name, stage, given, folder in stages:
        code = hashlib.sha256(f"{made}{fingerprint(stage)}{given[2:]}".encode()).hexdigest()[:16]
        steps.append(Step(OURS, name, (program, stage, *given, "--out", folder), folder, code))
        # A stage's result depends on the code of those before it too, but a bundle's not on other bundles.
        made += fingerprint(stage) if stage != "quantize" else ""
    return steps


def flat_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as llmexport 0.0.5 with transformers 4.57.6 reads it: links to its files, and its settings as
    they were before transformers 5, which is how Qwen has published its models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "manifest.json":
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path.resolve())
    config = read_config(checkpoint)
    if text := config.pop("text_config", None):
        # llmexport looks for the decoder's settings (hidden_size, ...) at the top.
        vision, rope = config["vision_config"], text.pop("rope_parameters")
        # transformers 4 has two keys for rotary positions, and no such thing in the vision tower.
        text |= {"rope_theta": rope["rope_theta"]}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        vision.pop("rope_parameters", None)
        # "model_type" of the text part would hide the model's; the others are spelled otherwise, or worked out.
        for name in ("model_type", "layer_types", "dtype"):
            text.pop(name, None)
        vision.pop("dtype", None)
        config["torch_dtype"] = config.pop("dtype", "bfloat16")
        config = {**text, **config}
        # transformers 5 leaves out what is its default.
        config.setdefault("vision_start_token_id", 151652)
        _replace(folder / "config.json", config)
    named = checkpoint / "tokenizer_config.json"
    if named.is_file():
        tokenizer = json.loads(named.read_text())
        if isinstance(special := tokenizer.get("extra_special_tokens"), list):
            # A list has this name in transformers 4, and the class of transformers 5 is not there.
            tokenizer["additional_special_tokens"] = special
            del tokenizer["extra_special_tokens"]
        if tokenizer.pop("backend", None):
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if (template := checkpoint / "chat_template.jinja").is_file():
            # llmexport's tokenizer writer looks for the template here alone.
            tokenizer["chat_template"] = template.read_text()
        _replace(folder / named.name, tokenizer)
    return folder


def _replace(path: Path, content: dict[str, Any]) -> None:
    """In place of a link, whose target stays as it is."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def describe_llmexport(python: Path) -> dict[str, Any]:
    """`folder` of the program, and `versions`.

    Raises:
        Hf2mnnError: it is not there.
    """
    done = None
    with suppress(OSError):
        done = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True)
    if done is None or done.returncode != 0:
        raise Hf2mnnError(
            f"{python} has no llmexport: 'make bench' makes its environment of bench/llmexport.txt; or give"
            " --llmexport-python, or leave it out with --only hf2mnn"
        )
    return json.loads(done.stdout)


def llmexport_steps(checkpoint: Path, root: Path, python: Path, found: dict[str, Any]) -> list[Step]:
    """The folder may have no spaces in its name: llmexport gives it to a shell as it is.

    Raises:
        Hf2mnnError: it has.
    """
    bundle, converter = root / "bundle", root / "convert"
    if re.search(r"\s", str(root)):
        raise Hf2mnnError(f"llmexport works in no folder with spaces in its name: {root}; give --work another one")
    flat = flat_checkpoint(checkpoint, root / "checkpoint")
    converter.write_text(f'#!/bin/sh\nexec {python} -c "{CONVERT}" "$@"\n')
    converter.chmod(0o755)
    command = [python, Path(found["folder"]) / "llmexport.py", "--path", flat, "--export", "mnn", "--dst_path", bundle]
    command += ["--type", read_config(checkpoint)["model_type"], "--mnnconvert", converter]
    command += ["--quant_bit", str(LLM_BITS), "--quant_block", str(LLM_BLOCK)]
    return [Step(LLMEXPORT, "export", tuple(command), bundle, json.dumps(found["versions"], sort_keys=True))]


# What is kept: a file for each step and repeat, and for each round, of which the tables are made.


class Records:
    """Measured records of a shape under `folder`/scale-rows, and the tables beside them."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder, shape
        self.added = "" if shape == DEFAULT else f"-{shape}"

    def _path(self, name: str) -> Path:
        return self.folder / "scale-rows" / self.shape / f"{name.replace(' ', '-')}.json"

    def get(self, name: str, circumstances: dict[str, Any]) -> dict[str, Any] | None:
        """What was measured, if it was under these circumstances."""
        path = self._path(name)
        record = json.loads(path.read_text()) if path.is_file() else {}
        return record.get("figures") if record.get("circumstances") == circumstances else None

    def put(self, name: str, circumstances: dict[str, Any], figures: dict[str, Any]) -> None:
        with whole_file(self._path(name)) as path:
            path.write_text(json.dumps({"figures": figures, "circumstances": circumstances}, indent=1) + "\n")

    def table(self, name: str) -> Path:
        return self.folder / f"{name}{self.added}.csv"


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """scale.csv of `runs`, its columns and `repeat`: medians, and the totals of each of our bundles."""
    shared, whole = runs["step"].isin(["source", "onnx", "mnn"]), [runs]
    for step in [step for step in runs["step"].unique() if step.startswith("quantize ")]:
        parts = runs[shared | (runs["step"] == step)].groupby("repeat")
        total = parts[["wall_s", "cpu_s", "bytes_written"]].sum().join(parts["peak_rss_mb"].max())
        total = total[parts["step"].count() == 4].reset_index()
        whole.append(total.assign(tool=OURS, step=f"total {step.removeprefix('quantize ')}"))
    table = pd.concat(whole, ignore_index=True)
    table = table.groupby(["tool", "step"], sort=False)[COLUMNS[2:]].median().reset_index()
    table["bytes_written"] = table["bytes_written"].round().astype(int)
    return table.sort_values("tool", key=lambda tools: tools == LLMEXPORT, kind="stable")[COLUMNS]


def summarize_engine(rounds: list[dict[str, dict[str, float]]]) -> pd.DataFrame:
    """engine.csv of figures by bundle, a dictionary for each round."""
    rows = []
    for bundle in rounds[0]:
        for figure in FIGURES:
            there = [found for found in rounds if figure in found[bundle]]
            if not there:
                continue
            values = [found[bundle][figure] for found in there]
            base = [found.get(LLMEXPORT, {}).get(figure, np.nan) for found in there]
            ratio = float(np.median(np.divide(values, base)))
            rows.append((bundle, figure, np.median(values), min(values), max(values), ratio, len(there)))
    return pd.DataFrame(rows, columns=ENGINE_COLUMNS)


# A run.


def warm(folder: Path) -> None:
    """Read the files once, so that the system has them in memory, as far as there is room."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            while file.read(BLOCK):
                pass


@contextmanager
def alone(path: Path = LOCK) -> Iterator[None]:
    """Raises MachineError where another bench has llmexport running: two of them do not fit into most machines."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MachineError("another bench runs llmexport on this machine; wait for its end") from None
        yield


def check_room(checkpoint: Path, root: Path, tools: Collection[str]) -> None:
    """Raises Hf2mnnError where disk or memory will not do, before anything is measured."""
    size = size_of(checkpoint)
    if not tools:
        return
    check_disk(root, int(sum(DISK[tool] for tool in tools) * size), " and ".join(tools))
    needed, free = MEMORY * size, available_memory()
    if LLMEXPORT in tools and free < needed:
        raise MachineError(
            f"llmexport needs {needed / 1e9:.0f} GB of memory for {checkpoint}, and {free / 1e9:.0f} GB are free; end"
            " other programs, or leave it out with --only hf2mnn"
        )


@dataclass
class Turns:
    """The steps of one tool, once for each repeat."""

    steps: list[Step]
    records: Records
    circumstances: dict[str, Any]
    logs: Path

    def _name(self, step: Step, repeat: int) -> str:
        return f"{step.tool} {step.name} {repeat}"

    def _present(self, step: Step) -> dict[str, Any]:
        return {**self.circumstances, "code": step.code}

    def left(self, repeat: int) -> list[Step]:
        """What has not been measured, or has left nothing for the steps after it."""
        return [
            step
            for step in self.steps
            if not step.folder.is_dir() or self.records.get(self._name(step, repeat), self._present(step)) is None
        ]

    def run(self, step: Step, repeat: int) -> None:
        name = self._name(step, repeat)
        print(f"{name}: ", end="", flush=True)
        # Gone before, so that it is not there twice.
        shutil.rmtree(step.folder, ignore_errors=True)
        # What others have left to be written would be written while this runs.
        os.sync()
        log, environment = self.logs / f"{name.replace(' ', '-')}.log", {**os.environ, "HF_HUB_OFFLINE": "1"}
        taken = measured(step.command, log, cwd=step.folder.parent, env=environment)
        if step.tool == LLMEXPORT and (missing := [file for file in LLM_FILES if not (step.folder / file).is_file()]):
            raise Hf2mnnError(f"llmexport has ended without {', '.join(missing)}; see {log}")
        self.records.put(name, self._present(step), asdict(taken))
        print(f"{taken.wall_s} s, {taken.peak_rss_mb:.0f} MB", flush=True)

    def rows(self, repeat: int) -> list[dict[str, Any]]:
        known = {step: self.records.get(self._name(step, repeat), self._present(step)) for step in self.steps}
        return [{"tool": step.tool, "step": step.name, "repeat": repeat, **known[step]} for step in self.steps]


def plain_ids(checkpoint: Path, count: int) -> list[int]:
    """Tokens of ordinary text, drawn by chance: none that a template, an image or a stop uses."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    ordinary = sorted(set(tokenizer["model"]["vocab"].values()) - special)
    return [int(token) for token in np.random.default_rng(0).choice(ordinary, count)]


def bundle_identity(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode()).hexdigest()


def time_engine(
    bundles: dict[str, Path], ids: list[int], rounds: int, threads: int, records: Records, circumstances: dict
) -> list[dict[str, dict[str, float]]]:
    """Figures by bundle, a dictionary for each round; a round that was measured of these very bundles is kept."""
    settings = {**DEFAULTS, "thread_num": threads, "precision": "low", "memory": "low", "backend_type": "cpu"}
    settings |= {"sampler_type": "greedy", "reuse_kv": False}
    program = hashlib.sha256(Path(__file__).with_name("scale_engine.py").read_bytes()).hexdigest()
    identities = {name: bundle_identity(folder) for name, folder in bundles.items()}
    present = {**circumstances, "settings": settings, "program": program, "bundles": identities}
    order, found = turns(list(bundles), rounds), []
    for number in range(rounds):
        figures = records.get(f"engine {number}", present)
        if figures is None:
            figures = {}
            for name in [name for repeat, name in order if repeat == number]:
                print(f"engine {number} {name}: ", end="", flush=True)
                warm(bundles[name])
                image = IMAGE if number < IMAGE_ROUNDS else 0
                figures[name] = time_bundle(bundles[name], settings, ids, image)
                print(", ".join(f"{key} {value:.4g}" for key, value in figures[name].items()), flush=True)
            records.put(f"engine {number}", present, figures)
        # Each round began with another one.
        found.append({name: figures[name] for name in bundles})
    return found


def time_bundle(bundle: Path, settings: dict[str, Any], ids: list[int], image: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="hf2mnn-bench-") as folder:
        result = Path(folder, "result.json")
        job = {"bundle": str(bundle.resolve()), "settings": settings, "prompt": ids[:PROMPT], "answer": ids[PROMPT:]}
        run_worker("scale_engine", {**job, "image": image, "result": str(result)}, time_limit=3600)
        return json.loads(result.read_text())


def print_markdown(title: str, table: pd.DataFrame, forms: dict[str, str]) -> None:
    """For docs/benchmarks/scale.md."""
    shown = table.copy()
    for column, form in forms.items():
        shown[column] = ["" if pd.isna(value) else form.format(value) for value in table[column]]
    align = ["left" if column in ("tool", "step", "bundle", "figure") else "right" for column in table.columns]
    print(f"\n{title}\n\n{shown.to_markdown(index=False, colalign=align, disable_numparse=True)}")


def report(records: Records, runs: list[dict[str, Any]], repeats: int) -> None:
    """Write scale.csv and print it, with what llmexport takes over ours."""
    table = summarize(pd.DataFrame(runs))
    with whole_file(records.table("scale")) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    forms = {"wall_s": "{:.1f}", "cpu_s": "{:.1f}", "peak_rss_mb": "{:.0f}", "bytes_written": "{:,}"}
    of = f"medians of {repeats} runs" if repeats > 1 else "one run"
    print_markdown(f"{records.shape}, {of}", table, forms)
    totals = table[table["step"].isin([f"total {LIKE}", "export"])].set_index("tool")[COLUMNS[2:]]
    if {OURS, LLMEXPORT} <= set(totals.index):
        ratios = totals.loc[LLMEXPORT] / totals.loc[OURS]
        print(f"\nllmexport over hf2mnn's total {LIKE}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def report_engine(records: Records, rounds: list[dict[str, dict[str, float]]]) -> None:
    table = summarize_engine(rounds)
    with whole_file(records.table("engine")) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    forms = dict.fromkeys(("median", "low", "high"), "{:.4g}") | {"ratio": "{:.3f}"}
    print_markdown(f"{records.shape}, in MNN.llm", table, forms)


def bench(args: argparse.Namespace) -> None:
    """Raises Hf2mnnError."""
    shape = args.checkpoint.name if args.checkpoint else args.like
    root = (args.work or args.out / f"scale-{shape}").resolve()
    root.mkdir(parents=True, exist_ok=True)
    records, tools = Records(args.out, shape), [args.only] if args.only else [OURS, LLMEXPORT]
    found = describe_llmexport(args.llmexport_python) if LLMEXPORT in tools else {"versions": {}}
    checkpoint = args.checkpoint.resolve() if args.checkpoint else root / "checkpoint"
    if not args.checkpoint and not (checkpoint / "manifest.json").is_file():
        program = [Path(sys.executable).parent / "hf2mnn", "synth", "--like", shape, "--tokenizer", MODEL]
        if subprocess.run([*program, "--out", checkpoint]).returncode != 0:
            raise Hf2mnnError("no checkpoint could be made")
    machine = describe_machine()
    base = f"{hashlib.sha256((checkpoint / 'config.json').read_bytes()).hexdigest()[:16]} {size_of(checkpoint)}"
    circumstances = {name: machine[name] for name in ("cpu", "cores", "MNN")} | {"base": base}
    steps = {}
    if OURS in tools:
        steps[OURS] = own_steps(checkpoint, root / OURS, args.variant or VARIANTS, args.threads)
    if LLMEXPORT in tools:
        steps[LLMEXPORT] = llmexport_steps(checkpoint, root / LLMEXPORT, args.llmexport_python, found)
    each = {tool: Turns(steps[tool], records, circumstances, root / "logs") for tool in tools}
    order = [(repeat, tool) for repeat in range(args.repeats) for tool in tools]
    waiting = {tool for repeat, tool in order if each[tool].left(repeat)}
    check_room(checkpoint, root, [tool for tool in tools if tool in waiting])
    libraries = {OURS: [sys.executable, "-c", WARM_OURS], LLMEXPORT: [args.llmexport_python, "-c", WARM_LLMEXPORT]}
    with alone() if LLMEXPORT in waiting else nullcontext():
        for repeat, tool in order:
            if left := each[tool].left(repeat):
                (root / tool).mkdir(parents=True, exist_ok=True)
                subprocess.run(libraries[tool], check=True, stdout=subprocess.DEVNULL)
                warm(checkpoint)
                for step in left:
                    each[tool].run(step, repeat)
    report(records, [row for repeat, tool in order for row in each[tool].rows(repeat)], args.repeats)
    made = {" ".join([step.tool, *step.name.split()[1:]]): step.folder for tool in tools for step in steps[tool]}
    bundles = {name: made[name] for name in (f"{OURS} {LIKE}", f"{OURS} {OWN}", LLMEXPORT) if name in made}
    if args.rounds and bundles:
        ids = plain_ids(checkpoint, PROMPT + ANSWER)
        report_engine(records, time_engine(bundles, ids, args.rounds, args.threads, records, circumstances))
    described = [f"{name} {value}" for name, value in (machine | found["versions"]).items()]
    print(f"\n{', '.join(described)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python bench/scale.py
  python bench/scale.py --like qwen2-vl-7b --only hf2mnn --variant int4 --rounds 0 --work /data/scale-7b
  python bench/scale.py --checkpoint models/shapes-vl --llmexport-python llmexport/bin/python""",
    )
    where = REPOSITORY / "results" / "bench"
    python = REPOSITORY / ".venv-llmexport" / "bin" / "python"
    parser.add_argument("--like", default=DEFAULT, help=f"shape of the checkpoint to make; default: {DEFAULT}")
    parser.add_argument("--checkpoint", type=Path, help="a folder to convert instead; nothing is made")
    parser.add_argument("--only", choices=[OURS, LLMEXPORT], help="leave the other tool out")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this bundle; again for more")
    parser.add_argument("--repeats", type=int, default=1, help="conversions by each tool, in turns; default: 1")
    parser.add_argument("--rounds", type=int, default=5, help="of the engine; 0 for none; default: 5")
    parser.add_argument("--threads", type=int, default=cores(), help="to quantize and of the engine; default: all")
    parser.add_argument("--llmexport-python", type=Path, default=python, help="default: .venv-llmexport/bin/python")
    parser.add_argument("--out", type=Path, default=where, help="for the tables; default: results/bench")
    parser.add_argument("--work", type=Path, help="for checkpoint and bundles; default: scale-SHAPE in --out")
    parser.add_argument("--again", action="store_true", help="measure what was measured already too")
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    # Not resolved: the interpreter of an environment is a link, and would no longer know its packages.
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
