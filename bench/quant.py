"""Compare methods of quantization with each other and with the MNN converter's own, in one run on one machine.

    shapes-vl     the embedded model, decoder and vision tower with the same bits and block, judged in the engine by
                  636 questions of its own world
    student-t     one layer of 1024 x 1536 weights, Student-t with 6 degrees of freedom: no activations, no answers
    qwen2-vl-2b   the decoder of a model of Qwen2-VL-2B's shape with random weights, 4 bits: time and memory

quant.csv has a row for each tool, method, bits and block: weight_error, the norm of all weights' errors over that of
the weights; mean_kld in nats and top1_agreement against PyTorch float32, as the bundle's config.json lets the engine
run; bytes of the weight files; seconds and peak_rss_mb of the quantization alone. Other figures of the same answers are
in quant-answers.csv, and in quant-ratios.csv each mean_kld over that of the converter's hqq with the same bits and
block: both answered the same questions, so a ratio is surer than the two that it is made of.

hf2mnn quantizes a float model of MNN; recording activations for awq and gptq is not in its seconds. The converter
quantizes only while it converts from ONNX, so its seconds hold the conversion; its row "float" is that conversion
without quantization. Memory is the peak of one process: of Python with its libraries (some 300 MB) for hf2mnn, of the
converter itself for the converter.

A row that was measured on this machine with the present code and tools is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.files import whole_file, whole_folder
from hf2mnn.core.fingerprint import fingerprint
from hf2mnn.core.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.evaluation.names import LOGITS, POSITIONS, SUMMARY
from hf2mnn.families import family_named
from hf2mnn.machine.hardware import cores, describe_machine
from hf2mnn.mnn import convert
from hf2mnn.mnn.bundle import (
    DECODER,
    PARTS,
    TOKENIZER,
    TOOLS,
    VISION,
    EngineSettings,
    convert_decoder,
    convert_vision,
    describe,
    write_configs,
    write_embedding,
)
from hf2mnn.mnn.convert import WeightFormat, convert_onnx, write_graph
from hf2mnn.mnn.tokenizer import write_tokenizer
from hf2mnn.quant.blob import pack, unpack
from hf2mnn.quant.folding import Scales, folded_points
from hf2mnn.quant.gptq import gptq_rows
from hf2mnn.quant.methods import CALIBRATED, Methods
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.write import write_weights
from hf2mnn.stages.quantize import run as quantize

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "models" / "shapes-vl"
SHAPES_VL, STUDENT_T, SCALE = "shapes-vl", "student-t", "qwen2-vl-2b"
OURS, CONVERTER = "hf2mnn", "converter"

KEY = ["data", "tool", "method", "bits", "block"]
COLUMNS = [*KEY, "weight_error", "mean_kld", "top1_agreement", "bytes", "seconds", "peak_rss_mb"]
ANSWERS = ["mean_kld_low", "mean_kld_high", "median_kld", "greedy_match", "task_accuracy", "vision_cosine"]

ENGINE = EngineSettings("low", "low")
SHAPE, DEGREES, SEED = (1024, 1536), 6, 0
"""Of the Student-t weights: outputs and inputs."""
CALIBRATION_ROWS = 4096
ROWS_AT_ONCE = 4096
RESAMPLES = 2000
NEEDS_GB, WORKS_GB = 35, 10
"""Disk for the 2B shape: from nothing, and beside checkpoint, ONNX and float model."""


@dataclass(frozen=True)
class Case:
    """One row. `method` "float" is the converter's float32 model."""

    data: str
    tool: str
    method: str
    bits: int
    block: int

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.data, self.tool, self.method, self.bits, self.block)))

    @property
    def form(self) -> WeightFormat:
        return WeightFormat(self.bits, self.block, method="rtn" if self.method == "float" else self.method)


def cases(data: str, full: bool) -> list[Case]:
    """The grid, without methods that have nothing to go by; `full` has more blocks where each is to be evaluated."""
    methods = [(OURS, "rtn"), (OURS, "hqq"), (OURS, "mse"), (CONVERTER, "rtn"), (CONVERTER, "hqq")]
    if data == SHAPES_VL:
        # 128 does not divide the 192 inputs of its vision tower.
        methods[3:3] = [(OURS, method) for method in CALIBRATED]
        formats = [(bits, block) for bits in (8, 4, 3, 2) for block in ((32, 64, 0) if full else (64,))]
    elif data == STUDENT_T:
        formats = [(bits, block) for bits in (8, 4, 3, 2) for block in (32, 64, 128, 0)]
    else:
        formats = [(4, 64)]
    grid = [Case(data, *method, *form) for form in formats for method in methods]
    return [Case(data, CONVERTER, "float", 32, 0), *grid]


# What is measured: in a process of its own, so that its peak is its own.


def load_kernels() -> None:
    """Let numba compile, or read what it has compiled before: that is not part of a quantization."""
    rows, upper = np.ones((8, 16), np.float32), np.eye(16, dtype=np.float32)
    levels = [round_rows(rows, 4, 16, False, 16, "mse"), gptq_rows(rows, 4, 16, False, 16, upper)]
    unpack(pack(levels[0].levels, 4), rows.size, 4)


def _peak_kb(status: str) -> int:
    """The largest of the peaks in texts of /proc/self/status. What wait4 says of a process begins with its parent's."""
    return max(map(int, re.findall(r"VmHWM:\s+(\d+) kB", status)))


def _timed(job: Callable[..., None], case: Case, *arguments: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        noted = Path(name, "status")
        # The converter's own peak is not to be had from outside.
        convert.CALL += f"; open({str(noted)!r}, 'a').write(open('/proc/self/status').read())"
        if case.tool == OURS:
            load_kernels()
        started = time.monotonic()
        job(case, *arguments)
        seconds = time.monotonic() - started
        peak = _peak_kb(noted.read_text() + (Path("/proc/self/status").read_text() if case.tool == OURS else ""))
    return {"seconds": round(seconds, 2), "peak_rss_mb": round(peak / 1024, 1)}


def timed(job: Callable[..., None], case: Case, *arguments: Any) -> dict[str, float]:
    """Seconds of `job(case, *arguments)` in a new process, and the peak in MB of the process that does the work."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["hf2mnn.quant.stages", "hf2mnn.mnn.bundle", "rich.table"])
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        return pool.submit(_timed, job, case, *arguments).result()


def quantize_bundle(case: Case, root: Path, folder: Path, threads: int) -> None:
    """Ours, of both parts of the float bundle in `root`."""
    activations = root / "activations" if case.method in CALIBRATED else None
    quantize(root / "onnx", root / "base", folder, Choice(case.form, case.form, ENGINE), threads, activations)


def quantize_decoder(case: Case, root: Path, folder: Path, threads: int) -> None:
    """Ours, of the float decoder in `root`."""
    part, methods = Part("decoder", root / "onnx", root / "base"), Methods()
    formats = part.formats(Choice(case.form, case.form, ENGINE), methods)
    folder.mkdir(parents=True)
    weights = folder / f"{part.file}.weight"
    graph, _ = write_weights(part.graph, part.operators, part.weights, weights, formats, methods, threads, part.name)
    write_graph(graph, folder / part.file)


def convert_parts(case: Case, root: Path, folder: Path) -> None:
    """The converter's, of the graphs in `root`."""
    onnx_folder = root / "onnx"
    if case.data == STUDENT_T:
        convert_onnx(onnx_folder / "decoder.onnx", folder / DECODER, case.form)
    else:
        convert_decoder(onnx_folder, folder, model_facts(root)["num_hidden_layers"], case.form)
    if case.data == SHAPES_VL:
        convert_vision(onnx_folder, folder, case.form)


def convert_bundle(case: Case, root: Path, folder: Path) -> dict[str, float]:
    """Time the converter, and put what it gives into a bundle; embedding and tokenizer are no part of the time."""
    inputs = {"onnx": Manifest.load(root / "onnx").digest()}
    manifest = Manifest("mnn", inputs, describe(case.form, case.form, ENGINE), tool_versions(*TOOLS))
    with stage_folder(folder, manifest) as partial:
        took = timed(convert_parts, case, root, partial)
        write_embedding(root / "onnx", partial)
        write_tokenizer(root / "onnx", partial / TOKENIZER)
        write_configs(partial, model_facts(root), ENGINE)
    return took


def make(case: Case, root: Path, folder: Path, threads: int) -> dict[str, float]:
    """Quantize into `folder`, and give what that took."""
    if case.tool == OURS:
        return timed(quantize_bundle if case.data == SHAPES_VL else quantize_decoder, case, root, folder, threads)
    if case.data == SHAPES_VL:
        return convert_bundle(case, root, folder)
    folder.mkdir(parents=True)
    return timed(convert_parts, case, root, folder)


# What came of it.


def _folded(root: Path, folder: Path) -> Scales:
    """The scales of channels that awq has folded into the weights of `folder`, none for other methods."""
    scales, points = Scales(), folded_points(folder)
    if points:
        model = model_facts(root)
        for fold in family_named(model["model_type"], folder).folds(model):
            if fold.producer in points:
                scales.add(fold, points[fold.producer])
    return scales


def weight_error(root: Path, folder: Path) -> float:
    """Norm of the errors of all weights of `folder`, over the norm of the float model's."""
    error, norm, scales = 0.0, 0.0, _folded(root, folder)
    for name in [name for name, (file, _) in PARTS.items() if (folder / file).is_file()]:
        right, made = (Part(name, root / "onnx", place) for place in (root / "base", folder))
        # The patch embedding is two operators of one name.
        for wanted, found in zip(right.operators, made.operators, strict=True):
            columns = scales.columns.get(found.name, np.ones(found.inputs, np.float32))
            rows = scales.rows.get(found.name, np.ones(found.outputs, np.float32))
            whole = made.weights.rows(found)
            for begin in range(0, found.outputs, ROWS_AT_ONCE):
                span = slice(begin, min(begin + ROWS_AT_ONCE, found.outputs))
                weights = right.weights.rows(wanted, span.start, span.stop)
                error += float(np.square(whole[span] * rows[span, None] / columns - weights).sum(dtype=np.float64))
                norm += float(np.square(weights).sum(dtype=np.float64))
    return (error / norm) ** 0.5


def model_facts(root: Path) -> dict[str, Any]:
    return json.loads((root / "onnx" / "model.json").read_text())


def weight_bytes(folder: Path) -> int:
    paths = [folder / f"{name}.weight" for name in (DECODER, VISION)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def evaluation_folder(root: Path, case: Case) -> Path:
    return root / "evaluation" / case.name


def answers(case: Case, root: Path, folder: Path) -> dict[str, Any]:
    """The evaluation of a bundle, as its summary.json has it.

    Raises:
        Hf2mnnError: the engine does not run it.
    """
    from hf2mnn.stages.evaluate import run as evaluate

    place = evaluation_folder(root, case)
    evaluate(root / "reference", root / "onnx", place, folder, threads=1, time_limit=3600)
    summary = json.loads((place / SUMMARY).read_text())
    (place / LOGITS).unlink()
    if summary["fault"]:
        raise Hf2mnnError(f"{case.name}: {summary['fault']}")
    return summary


# What is kept: a file for each row, of which the tables are made.


class Rows:
    """Measured rows under `folder`/rows, and the tables beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, case: Case) -> Path:
        return self.folder / "rows" / f"{case.name}.json"

    def has(self, case: Case, circumstances: dict[str, Any]) -> bool:
        """Whether the row was measured under these circumstances."""
        path = self._path(case)
        return path.is_file() and json.loads(path.read_text())["circumstances"] == circumstances

    def put(self, case: Case, circumstances: dict[str, Any], figures: dict[str, Any]) -> None:
        with whole_file(self._path(case)) as path:
            record = {**asdict(case), **figures, "circumstances": circumstances}
            path.write_text(json.dumps(record, indent=1) + "\n")
        table = self.table()
        for name, columns in (("quant.csv", COLUMNS), ("quant-answers.csv", [*KEY, *ANSWERS])):
            rows = table[table["data"] == SHAPES_VL] if columns != COLUMNS else table
            with whole_file(self.folder / name) as path:
                rows[columns].to_csv(path, index=False, float_format="%.6g")

    def table(self) -> pd.DataFrame:
        """All rows that there are, in the order of the grid."""
        records = [json.loads(path.read_text()) for path in (self.folder / "rows").glob("*.json")]
        order = {case: place for place, case in enumerate(c for data in DATA for c in cases(data, full=True))}
        records = [record for record in records if Case(*(record[name] for name in KEY)) in order]
        records.sort(key=lambda record: order[Case(*(record[name] for name in KEY))])
        return pd.DataFrame(records, columns=[*COLUMNS, *ANSWERS])


def ratios(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """KEY, kld_ratio, kld_ratio_low, kld_ratio_high of what was evaluated in `root`: mean_kld over that of the
    converter's hqq with the same bits and block, and its 95 % interval, from examples drawn for both alike.
    """

    def sums(case: Case) -> np.ndarray:
        return pd.read_parquet(evaluation_folder(root, case) / POSITIONS).groupby("id")["kld"].sum().to_numpy()

    found = []
    for case in (Case(*row) for row in table.loc[table["mean_kld"].notna() & (table["bits"] < 16), KEY].to_numpy()):
        other = replace(case, tool=CONVERTER, method="hqq")
        if case != other and all((evaluation_folder(root, c) / POSITIONS).is_file() for c in (case, other)):
            own, theirs = sums(case), sums(other)
            count = len(own)
            drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            low, high = np.quantile(drawn @ own / (drawn @ theirs), [0.025, 0.975])
            found.append((*asdict(case).values(), own.sum() / theirs.sum(), low, high))
    return pd.DataFrame(found, columns=[*KEY, "kld_ratio", "kld_ratio_low", "kld_ratio_high"])


def circumstances_of(base: str, threads: int) -> dict[str, dict[str, Any]]:
    """By tool what a row depends on beside its case; `base` names what its data were made of."""
    machine = describe_machine()
    found = {name: machine[name] for name in ("cpu", "cores", "MNN")} | {"base": base}
    return {OURS: found | {"code": fingerprint("quantize"), "threads": threads}, CONVERTER: found}


# The data: a folder each, with onnx/ and base/, and what else its rows need.


def prepare_student_t(root: Path, shape: tuple[int, int] = SHAPE) -> str:
    weight = np.random.default_rng(SEED).standard_t(DEGREES, shape).astype(np.float32)
    with whole_folder(root) as folder:
        (folder / "onnx").mkdir()
        (folder / "base").mkdir()
        node = helper.make_node("MatMul", ["x", "layer.weight"], ["y"])
        given, made = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
            for name, size in (("x", shape[1]), ("y", shape[0]))
        )
        constant = numpy_helper.from_array(np.ascontiguousarray(weight.T), "layer.weight")
        graph = helper.make_graph([node], "layer", [given], [made], [constant])
        path = folder / "onnx" / "decoder.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        convert_onnx(path, folder / "base" / DECODER, WeightFormat())
    return hashlib.sha256(weight.tobytes()).hexdigest()[:16]


def prepare_shapes_vl(root: Path) -> str:
    """The stages up to the base and the recorded activations; made again where model, sets or code changed."""
    stages = ("source", "reference", "onnx", "mnn", "activations", "evaluate")
    digest = hashlib.sha256("".join(map(fingerprint, stages)).encode())
    for path in sorted(path for path in MODEL.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.read_bytes())
    base, mark = digest.hexdigest()[:16], root / "made"
    if mark.is_file() and mark.read_text() == base:
        return base
    from hf2mnn.stages.calibrate import run as record_calibration
    from hf2mnn.stages.convert import run as convert_graphs
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint
    from hf2mnn.stages.reference import run as run_reference

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    program = MODEL / "training" / "make_benchmark.py"
    subprocess.run([sys.executable, program, "--out", root / "questions"], check=True)
    source = fetch_checkpoint(root / "checkpoint", MODEL)
    reference = run_reference(source, root / "questions", root / "reference", 64, cores())
    calibration = run_reference(source, MODEL / "calibration", root / "calibration", 64, cores())
    record_calibration(source, calibration, reference, root / "activations", CALIBRATION_ROWS, cores())
    convert_graphs(export_onnx(source, root / "onnx"), root / "base")
    mark.write_text(base)
    return base


def prepare_scale(root: Path) -> str:
    """Whatever there is of checkpoint, source, onnx and base is taken as it is.

    Raises:
        Hf2mnnError: too little space on the disk.
    """
    from hf2mnn.checkpoint.synth import make_checkpoint_like
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint

    root.mkdir(parents=True, exist_ok=True)
    whole = (root / "base" / DECODER).is_file()
    needs, free = WORKS_GB if whole else NEEDS_GB, shutil.disk_usage(root).free / 1e9
    if free < needs:
        raise Hf2mnnError(
            f"{SCALE} needs {needs} GB, and the disk of {root} has {free:.0f} GB free; give --scale a folder elsewhere"
        )
    if whole:
        return "0"
    if not (root / "onnx" / "manifest.json").is_file():
        if not (root / "checkpoint" / "manifest.json").is_file():
            make_checkpoint_like(SCALE, root / "checkpoint", tokenizer=MODEL)
        export_onnx(fetch_checkpoint(root / "checkpoint", root / "checkpoint"), root / "onnx")
    with whole_folder(root / "base") as folder:
        convert_decoder(root / "onnx", folder, model_facts(root)["num_hidden_layers"])
    return "0"


DATA = {SHAPES_VL: prepare_shapes_vl, STUDENT_T: prepare_student_t, SCALE: prepare_scale}


def measure(wanted: list[Case], rows: Rows, root: Path, circumstances: dict[str, Any], threads: int) -> None:
    """Quantize one after another, then evaluate side by side, as many at a time as there are cores."""
    work = root / "work"
    for first in range(0, len(wanted), cores()):
        together, found = wanted[first : first + cores()], {}
        shutil.rmtree(work, ignore_errors=True)
        for case in together:
            print(case.name, end=": ", flush=True)
            took, folder = make(case, root, work / case.name, threads), work / case.name
            print(f"{took['seconds']} s, {took['peak_rss_mb']:.0f} MB", flush=True)
            found[case] = took | {"weight_error": weight_error(root, folder), "bytes": weight_bytes(folder)}
        judged = [case for case in together if case.data == SHAPES_VL]
        with ThreadPoolExecutor(cores()) as pool:
            for case, summary in zip(judged, pool.map(lambda c: answers(c, root, work / c.name), judged), strict=True):
                found[case] |= {name: summary[name] for name in ("mean_kld", "top1_agreement", *ANSWERS)}
        for case, figures in found.items():
            rows.put(case, circumstances[case.tool], figures)
    shutil.rmtree(work, ignore_errors=True)


FORMS = {"weight_error": "{:.4f}", "mean_kld": "{:.3g}", "top1_agreement": "{:.2%}", "bytes": "{:,}"}
FORMS |= {"seconds": "{:.2f}", "peak_rss_mb": "{:.0f}"}


def print_table(title: str, table: pd.DataFrame) -> None:
    """Columns that hold something."""
    shown = Table(title=title)
    columns = [name for name in table.columns if table[name].notna().any()]
    for name in columns:
        shown.add_column(name, justify="left" if name in ("tool", "method") else "right")
    for row in table.to_dict("records"):
        shown.add_row(*(FORMS.get(name, "{}" if name in KEY else "{:.2f}").format(row[name]) for name in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def finish(rows: Rows) -> None:
    """Print what there is, and write the ratios."""
    table = rows.table()
    for data, found in table.groupby("data", sort=False):
        print_table(data, found[COLUMNS[1:]])
    compared = ratios(table, rows.folder / SHAPES_VL)
    if len(compared):
        with whole_file(rows.folder / "quant-ratios.csv") as path:
            compared.to_csv(path, index=False, float_format="%.4g")
        print_table(f"{SHAPES_VL}: mean KL divergence over that of the converter's hqq", compared.drop(columns="data"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python bench/quant.py
  python bench/quant.py student-t --again
  python bench/quant.py qwen2-vl-2b --scale /data/scale""",
    )
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"{', '.join(DATA)}; left out, the first two")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "bench", help="default: results/bench")
    parser.add_argument("--scale", type=Path, help=f"folder for the 2B shape; default: {SCALE} in --out")
    parser.add_argument("--threads", type=int, default=cores(), help="to quantize with; default: all cores")
    parser.add_argument("--full", action="store_true", help="shapes-vl with blocks of 32 and of a channel (0) too")
    parser.add_argument("--again", action="store_true", help="measure what was measured already too")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.data if name not in DATA]:
        parser.error(f"there is no {unknown[0]}; these are: {', '.join(DATA)}")
    rows = Rows(args.out)
    # Of processes that are started: two engines' bars over each other say nothing.
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        for data in args.data or [SHAPES_VL, STUDENT_T]:
            root = args.scale if data == SCALE and args.scale else args.out / data
            present = circumstances_of(DATA[data](root), args.threads)
            grid = cases(data, args.full)
            wanted = [case for case in grid if args.again or not rows.has(case, present[case.tool])]
            measure(wanted, rows, root, present, args.threads)
    except Hf2mnnError as error:
        sys.exit(f"bench/quant.py: {error}")
    finish(rows)


if __name__ == "__main__":
    main()
