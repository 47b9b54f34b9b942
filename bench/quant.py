"""Compare methods of quantization with each other and with those of MNN's converter, in one run on one machine.

    shapes-vl     the embedded model, decoder and vision tower with the same bits and block, evaluated in the engine by
                  636 questions about its images
    student-t     one layer of 1024 x 1536 weights, Student-t with 6 degrees of freedom; weight errors only
    qwen2-vl-2b   the decoder of a model of Qwen2-VL-2B's shape with random weights, 4 bits: time and memory

quant.csv has a row for each tool, method, bits and block: weight_error, the norm of all weights' errors over that of
the weights; mean_kld in nats and top1_agreement against PyTorch float32, with the bundle's engine settings; bytes of
the weight files; seconds and peak_rss_mb of the quantization alone. quant-answers.csv has more figures of the same
answers. quant-ratios.csv has each mean_kld over that of the converter's hqq with the same bits and block: both answered
the same questions, so a ratio is more precise than its two terms.

hf2mnn quantizes a float model of MNN; recording inputs for awq and gptq is not in its seconds. The converter quantizes
only while it converts from ONNX, so its seconds include the conversion; its row "float" is that conversion without
quantization. Memory is the peak of one process: for hf2mnn of Python with its libraries (some 300 MB), else of the
converter itself.

A row that was measured on this machine with the current code and tools is kept.
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

import mnn_quantizer
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.files import atomic_file, atomic_folder
from hf2mnn.core.fingerprint import fingerprint
from hf2mnn.core.manifest import tool_versions
from hf2mnn.core.stage import open_stage
from hf2mnn.evaluation.findings import POSITIONS, SUMMARY
from hf2mnn.families import get_family
from hf2mnn.machine.hardware import cores, describe_machine
from hf2mnn.mnn import convert
from hf2mnn.mnn.bundle import (
    DECODER,
    GRAPHS,
    PARTS,
    TOKENIZER,
    VISION,
    EngineSettings,
    convert_decoder,
    write_configs,
    write_embedding,
)
from hf2mnn.mnn.convert import convert_onnx, read_graph, write_graph
from hf2mnn.mnn.tokenizer import write_tokenizer
from hf2mnn.quant.blob import pack, unpack
from hf2mnn.quant.folding import Scales, folded_tap_points
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.gptq import gptq_rows
from hf2mnn.quant.methods import CALIBRATED, Methods
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.weights import WeightFile, operators
from hf2mnn.quant.write import write_weights
from hf2mnn.stages import stage_named
from hf2mnn.stages.quantize import quantize

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "models" / "shapes-vl"
SHAPES_VL, STUDENT_T, SCALE = "shapes-vl", "student-t", "qwen2-vl-2b"
OURS, CONVERTER = "hf2mnn", "converter"

KEY = ["data", "tool", "method", "bits", "block"]
COLUMNS = [*KEY, "weight_error", "mean_kld", "top1_agreement", "bytes", "seconds", "peak_rss_mb"]
ANSWERS = ["mean_kld_low", "mean_kld_high", "median_kld", "greedy_match", "task_accuracy", "vision_cosine"]

ENGINE = EngineSettings("low", "low")
SHAPE, DEGREES, SEED = (1024, 1536), 6, 0
"""Shape [outputs, inputs], degrees of freedom and seed of the Student-t weights."""
CALIBRATION_ROWS = 4096
ROWS_AT_ONCE = 4096
RESAMPLES = 2000
NEEDS_GB, WORKS_GB = 35, 10
"""Free disk space for the 2B shape: for all folders, and if those up to the graphs exist."""


@dataclass(frozen=True)
class Case:
    """A row of quant.csv. `method` "float" is the converter's float32 model."""

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
    """Return the rows of a data set; `full` adds blocks of 32 and of a channel to shapes-vl."""
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


# Measurements, each in a process of its own because of its peak memory


def load_kernels() -> None:
    """Compile the kernels or load them from the cache, which is not a part of quantization."""
    rows, Hinv = np.ones((8, 16), np.float32), np.eye(16, dtype=np.float32)
    gptq_rows(rows, WeightFormat(4, 16), Hinv)
    unpack(pack(round_rows(rows, WeightFormat(4, 16, method="mse")).q, 4), rows.size, 4)


def _peak_kb(status: str) -> int:
    """Return the largest peak in texts of /proc/self/status; that of wait4 would include the parent's memory."""
    return max(map(int, re.findall(r"VmHWM:\s+(\d+) kB", status)))


def _timed(job: Callable[..., None], case: Case, *arguments: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        status = Path(name, "status")
        # Only the converter itself can read its peak.
        convert.CALL += f"; open({str(status)!r}, 'a').write(open('/proc/self/status').read())"
        if case.tool == OURS:
            load_kernels()
        started = time.monotonic()
        job(case, *arguments)
        seconds = time.monotonic() - started
        peak = _peak_kb(status.read_text() + (Path("/proc/self/status").read_text() if case.tool == OURS else ""))
    return {"seconds": round(seconds, 2), "peak_rss_mb": round(peak / 1024, 1)}


def timed(job: Callable[..., None], case: Case, *arguments: Any) -> dict[str, float]:
    """Run `job(case, *arguments)` in a new process; return seconds and peak memory of the quantization."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["hf2mnn.quant.variant", "hf2mnn.mnn.bundle", "rich.table"])
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        return pool.submit(_timed, job, case, *arguments).result()


def quantize_bundle(case: Case, root: Path, folder: Path, threads: int) -> None:
    """Quantize both parts by hf2mnn."""
    inputs = root / "inputs" if case.method in CALIBRATED else None
    quantize(root / "onnx", root / "graphs", folder, Choice(case.form, case.form, ENGINE), threads, inputs)


def quantize_decoder(case: Case, root: Path, folder: Path, threads: int) -> None:
    """Quantize the decoder by hf2mnn."""
    part, methods = Part("decoder", root / "onnx", root / "graphs"), Methods()
    formats = part.formats(Choice(case.form, case.form, ENGINE), methods)
    folder.mkdir(parents=True)
    weights = folder / f"{part.file}.weight"
    graph, _ = write_weights(part.graph, part.operators, part.weights, weights, formats, methods, threads, part.name)
    write_graph(graph, folder / part.file)


def convert_parts(case: Case, root: Path, folder: Path) -> None:
    """Quantize the graphs by MNN's converter."""
    onnx_folder = root / "onnx"
    if case.data == STUDENT_T:
        mnn_quantizer.convert(onnx_folder / "decoder.onnx", folder / DECODER, case.form)
    else:
        mnn_quantizer.convert_decoder(onnx_folder, folder, model_info(root)["num_hidden_layers"], case.form)
    if case.data == SHAPES_VL:
        mnn_quantizer.convert_vision(onnx_folder, folder, case.form)


def convert_bundle(case: Case, root: Path, folder: Path) -> dict[str, float]:
    """Make a bundle by MNN's converter; embedding and tokenizer are not timed."""
    settings = Choice(case.form, case.form, ENGINE).settings()
    with open_stage(stage_named("quantize"), folder, {"onnx": root / "onnx"}, settings) as stage:
        costs = timed(convert_parts, case, root, stage.folder)
        write_embedding(root / "onnx", stage.folder)
        write_tokenizer(root / "onnx", stage.folder / TOKENIZER)
        write_configs(stage.folder, model_info(root), ENGINE)
    return costs


def make(case: Case, root: Path, folder: Path, threads: int) -> dict[str, float]:
    """Quantize into `folder`; return seconds and peak memory."""
    if case.tool == OURS:
        return timed(quantize_bundle if case.data == SHAPES_VL else quantize_decoder, case, root, folder, threads)
    if case.data == SHAPES_VL:
        return convert_bundle(case, root, folder)
    folder.mkdir(parents=True)
    return timed(convert_parts, case, root, folder)


# Results


def _folded(root: Path, folder: Path) -> Scales:
    """Return the channel scales that awq has folded into the weights of `folder`; other methods have none."""
    scales, factors = Scales(), folded_tap_points(folder)
    if factors:
        model = model_info(root)
        for fold in get_family(model["model_type"], folder).folds(model):
            if fold.smooth_layer in factors:
                scales.add(fold, factors[fold.smooth_layer])
    return scales


def weight_error(root: Path, folder: Path) -> float:
    """Return the norm of the errors of all weights of `folder` over the norm of the float weights."""
    error, norm, scales = 0.0, 0.0, _folded(root, folder)
    for name in [name for name, (file, _) in PARTS.items() if (folder / file).is_file()]:
        part = Part(name, root / "onnx", root / "graphs")
        graph = read_graph(folder / part.file)
        file = WeightFile(graph, folder / f"{part.file}.weight")
        # The patch embedding is two operators of one name.
        for exact, stored in zip(part.operators, operators(graph, part.modules), strict=True):
            columns = scales.columns.get(stored.name, np.ones(stored.inputs, np.float32))
            rows = scales.rows.get(stored.name, np.ones(stored.outputs, np.float32))
            quantized = file.rows(stored)
            for begin in range(0, stored.outputs, ROWS_AT_ONCE):
                span = slice(begin, min(begin + ROWS_AT_ONCE, stored.outputs))
                weights = part.weights.rows(exact, span.start, span.stop)
                restored = quantized[span] * rows[span, None] / columns
                error += float(np.square(restored - weights).sum(dtype=np.float64))
                norm += float(np.square(weights).sum(dtype=np.float64))
    return (error / norm) ** 0.5


def model_info(root: Path) -> dict[str, Any]:
    return json.loads((root / "onnx" / "model.json").read_text())


def weight_bytes(folder: Path) -> int:
    paths = [folder / f"{name}.weight" for name in (DECODER, VISION)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def evaluation_folder(root: Path, case: Case) -> Path:
    return root / "evaluation" / case.name


def answers(case: Case, root: Path, folder: Path) -> dict[str, Any]:
    """Evaluate a bundle; return the content of summary.json.

    Raises:
        Hf2mnnError: The engine does not run the bundle.
    """
    from hf2mnn.stages.evaluate import run as evaluate

    destination = evaluation_folder(root, case)
    evaluate(root / "reference", root / "onnx", destination, folder, threads=1, time_limit=3600)
    summary = json.loads((destination / SUMMARY).read_text())
    if summary["fault"]:
        raise Hf2mnnError(f"{case.name}: {summary['fault']}")
    return summary


# Measured rows: a file for each, and the tables


class Rows:
    """Measured rows in `folder`/rows, and the tables in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, case: Case) -> Path:
        return self.folder / "rows" / f"{case.name}.json"

    def has(self, case: Case, conditions: dict[str, Any]) -> bool:
        """Return whether the row was measured under these conditions."""
        path = self._path(case)
        return path.is_file() and json.loads(path.read_text())["conditions"] == conditions

    def put(self, case: Case, conditions: dict[str, Any], figures: dict[str, Any]) -> None:
        with atomic_file(self._path(case)) as path:
            record = {**asdict(case), **figures, "conditions": conditions}
            path.write_text(json.dumps(record, indent=1) + "\n")
        table = self.table()
        for name, columns in (("quant.csv", COLUMNS), ("quant-answers.csv", [*KEY, *ANSWERS])):
            rows = table[table["data"] == SHAPES_VL] if columns != COLUMNS else table
            with atomic_file(self.folder / name) as path:
                rows[columns].to_csv(path, index=False, float_format="%.6g")

    def table(self) -> pd.DataFrame:
        """Return all rows in the order of the grid."""
        records = [json.loads(path.read_text()) for path in (self.folder / "rows").glob("*.json")]
        order = {case: index for index, case in enumerate(c for data in DATA for c in cases(data, full=True))}
        records = [record for record in records if Case(*(record[name] for name in KEY)) in order]
        records.sort(key=lambda record: order[Case(*(record[name] for name in KEY))])
        return pd.DataFrame(records, columns=[*COLUMNS, *ANSWERS])


def ratios(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Return KEY, kld_ratio, kld_ratio_low, kld_ratio_high of the rows that were evaluated in `root`.

    The ratio is mean_kld over that of the converter's hqq with the same bits and block. Its 95 % interval is a paired
    bootstrap over examples.
    """

    def sums(case: Case) -> np.ndarray:
        return pd.read_parquet(evaluation_folder(root, case) / POSITIONS).groupby("id")["kld"].sum().to_numpy()

    results = []
    for case in (Case(*row) for row in table.loc[table["mean_kld"].notna() & (table["bits"] < 16), KEY].to_numpy()):
        other = replace(case, tool=CONVERTER, method="hqq")
        if case != other and all((evaluation_folder(root, c) / POSITIONS).is_file() for c in (case, other)):
            own, theirs = sums(case), sums(other)
            count = len(own)
            drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            low, high = np.quantile(drawn @ own / (drawn @ theirs), [0.025, 0.975])
            results.append((*asdict(case).values(), own.sum() / theirs.sum(), low, high))
    return pd.DataFrame(results, columns=[*KEY, "kld_ratio", "kld_ratio_low", "kld_ratio_high"])


def conditions_of(data: str, threads: int) -> dict[str, dict[str, Any]]:
    """Return by tool what a row depends on beside its case; `data` identifies its inputs."""
    machine = describe_machine()
    shared = {"cpu": machine["cpu"], "cores": machine["cores"], **tool_versions("MNN"), "data": data}
    code = fingerprint(stage_named("quantize"))
    return {OURS: shared | {"code": code, "threads": threads}, CONVERTER: shared}


# Data: a folder each, with onnx/ and graphs/, and other inputs of its rows


def prepare_student_t(root: Path, shape: tuple[int, int] = SHAPE) -> str:
    weight = np.random.default_rng(SEED).standard_t(DEGREES, shape).astype(np.float32)
    with atomic_folder(root) as folder:
        (folder / "onnx").mkdir()
        (folder / "graphs").mkdir()
        node = helper.make_node("MatMul", ["x", "layer.weight"], ["y"])
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
            for name, size in (("x", shape[1]), ("y", shape[0]))
        )
        constant = numpy_helper.from_array(np.ascontiguousarray(weight.T), "layer.weight")
        graph = helper.make_graph([node], "layer", [x], [y], [constant])
        path = folder / "onnx" / "decoder.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        graph, weights = GRAPHS["decoder"]
        convert_onnx(path, folder / "graphs" / weights).save(folder / "graphs" / graph)
    return hashlib.sha256(weight.tobytes()).hexdigest()[:16]


def prepare_shapes_vl(root: Path) -> str:
    """Run the stages up to graphs and recorded inputs, unless model, sets and code are unchanged."""
    stages = ("fetch", "reference", "export", "convert", "calibrate", "evaluate")
    digest = hashlib.sha256("".join(fingerprint(stage_named(stage)) for stage in stages).encode())
    for path in sorted(path for path in MODEL.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.read_bytes())
    data, mark = digest.hexdigest()[:16], root / "digest"
    if mark.is_file() and mark.read_text() == data:
        return data
    from hf2mnn.stages.calibrate import run as record_calibration
    from hf2mnn.stages.convert import run as convert_graphs
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint
    from hf2mnn.stages.reference import run as run_reference

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    program = MODEL / "training" / "make_benchmark.py"
    subprocess.run([sys.executable, program, "--out", root / "questions"], check=True)
    checkpoint = fetch_checkpoint(root / "checkpoint", MODEL)
    reference = run_reference(checkpoint, root / "questions", root / "reference", 64, cores())
    calibration = run_reference(checkpoint, MODEL / "calibration", root / "calibration", 64, cores())
    record_calibration(checkpoint, calibration, root / "inputs", reference, CALIBRATION_ROWS, cores())
    convert_graphs(export_onnx(checkpoint, root / "onnx"), root / "graphs")
    mark.write_text(data)
    return data


def prepare_scale(root: Path) -> str:
    """Make checkpoint, onnx and graphs; existing folders are used without a check.

    Raises:
        Hf2mnnError: The disk has too little free space.
    """
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint
    from synth import make_checkpoint_like

    root.mkdir(parents=True, exist_ok=True)
    complete = (root / "graphs" / GRAPHS["decoder"][0]).is_file()
    needs, free = WORKS_GB if complete else NEEDS_GB, shutil.disk_usage(root).free / 1e9
    if free < needs:
        raise Hf2mnnError(
            f"{SCALE} needs {needs} GB, but the disk of {root} has {free:.0f} GB free; set --scale to a folder on"
            " another disk"
        )
    if complete:
        return "0"
    if not (root / "onnx" / "manifest.json").is_file():
        if not (root / "checkpoint" / "manifest.json").is_file():
            make_checkpoint_like(SCALE, root / "checkpoint", tokenizer=MODEL)
        export_onnx(fetch_checkpoint(root / "checkpoint", root / "checkpoint"), root / "onnx")
    with atomic_folder(root / "graphs") as folder:
        convert_decoder(root / "onnx", folder, model_info(root)["num_hidden_layers"])
    return "0"


DATA = {SHAPES_VL: prepare_shapes_vl, STUDENT_T: prepare_student_t, SCALE: prepare_scale}


def measure(wanted: list[Case], rows: Rows, root: Path, conditions: dict[str, Any], threads: int) -> None:
    """Quantize one after the other, then evaluate in parallel, as many at a time as there are cores."""
    work = root / "work"
    for first in range(0, len(wanted), cores()):
        batch, results = wanted[first : first + cores()], {}
        shutil.rmtree(work, ignore_errors=True)
        for case in batch:
            print(case.name, end=": ", flush=True)
            costs, folder = make(case, root, work / case.name, threads), work / case.name
            print(f"{costs['seconds']} s, {costs['peak_rss_mb']:.0f} MB", flush=True)
            results[case] = costs | {"weight_error": weight_error(root, folder), "bytes": weight_bytes(folder)}
        evaluated = [case for case in batch if case.data == SHAPES_VL]
        with ThreadPoolExecutor(cores()) as pool:
            for case, summary in zip(
                evaluated, pool.map(lambda c: answers(c, root, work / c.name), evaluated), strict=True
            ):
                results[case] |= {name: summary[name] for name in ("mean_kld", "top1_agreement", *ANSWERS)}
        for case, figures in results.items():
            rows.put(case, conditions[case.tool], figures)
    shutil.rmtree(work, ignore_errors=True)


FORMS = {"weight_error": "{:.4f}", "mean_kld": "{:.3g}", "top1_agreement": "{:.2%}", "bytes": "{:,}"}
FORMS |= {"seconds": "{:.2f}", "peak_rss_mb": "{:.0f}"}


def print_table(title: str, table: pd.DataFrame) -> None:
    """Print a table without empty columns."""
    printed = Table(title=title)
    columns = [name for name in table.columns if table[name].notna().any()]
    for name in columns:
        printed.add_column(name, justify="left" if name in ("tool", "method") else "right")
    for row in table.to_dict("records"):
        printed.add_row(*(FORMS.get(name, "{}" if name in KEY else "{:.2f}").format(row[name]) for name in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(printed)


def finish(rows: Rows) -> None:
    """Print the tables, and write the ratios."""
    table = rows.table()
    for data, group in table.groupby("data", sort=False):
        print_table(data, group[COLUMNS[1:]])
    compared = ratios(table, rows.folder / SHAPES_VL)
    if len(compared):
        with atomic_file(rows.folder / "quant-ratios.csv") as path:
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
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"{', '.join(DATA)}; default: the first two")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "bench", help="default: results/bench")
    parser.add_argument("--scale", type=Path, help=f"folder for the 2B shape; default: {SCALE} in --out")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of the quantization; default: all cores")
    parser.add_argument("--full", action="store_true", help="add blocks of 32 and of a channel (0) to shapes-vl")
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.data if name not in DATA]:
        parser.error(f"unknown data {unknown[0]!r}; use {', '.join(DATA)}")
    rows = Rows(args.out)
    # Child processes inherit this: two progress bars would overwrite each other.
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        for data in args.data or [SHAPES_VL, STUDENT_T]:
            root = args.scale if data == SCALE and args.scale else args.out / data
            present = conditions_of(DATA[data](root), args.threads)
            grid = cases(data, args.full)
            wanted = [case for case in grid if args.again or not rows.has(case, present[case.tool])]
            measure(wanted, rows, root, present, args.threads)
    except Hf2mnnError as error:
        sys.exit(f"bench/quant.py: {error}")
    finish(rows)


if __name__ == "__main__":
    main()
