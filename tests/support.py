"""A folder to run Snakemake in, and the programs as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES_VL = REPOSITORY / "models" / "shapes-vl"
BIN = Path(sys.executable).parent
TEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"},
}
VISION = {"depth": 1, "embed_dim": 96, "num_heads": 3}
"""Settings of a small checkpoint, for `make_checkpoint`."""
QUICK = "benchmark: {repeats: 1, prompt_tokens: 32, answer_tokens: 8}"


@dataclass(frozen=True)
class Workspace:
    """A folder in which Snakemake runs, with the repository's Snakefile and a config.yaml of its own."""

    folder: Path

    def snakemake(
        self, *arguments: str, cores: int | None = 2, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`cores` None names none, as a cluster's user and a report do."""
        counted = [] if cores is None else ["--cores", str(cores)]
        command = [BIN / "snakemake", "-s", REPOSITORY / "Snakefile", *counted, *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def config(self, old: str, new: str) -> None:
        """Replace text in config.yaml, which must be there."""
        path = self.folder / "config.yaml"
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))


def make_workspace(folder: Path) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    content = (REPOSITORY / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{content}\n# Of no use as figures, but 50 s shorter.\n{QUICK}\n")
    for name in ("models", "evaluation"):
        (folder / name).symlink_to(REPOSITORY / name)
    return Workspace(folder)


def run_cli(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The hf2mnn command as a user starts it."""
    command = [BIN / "hf2mnn", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600
    )


def float_bundle(onnx_folder: Path, destination: Path) -> Path:
    """Make a float32 bundle, and its graphs beside it in a folder whose name ends in "-graphs"."""
    from hf2mnn.mnn.bundle import EngineSettings
    from hf2mnn.quant.formats import WeightFormat
    from hf2mnn.quant.variant import Choice
    from hf2mnn.stages.convert import run as convert_graphs
    from hf2mnn.stages.quantize import quantize

    graphs = convert_graphs(onnx_folder, destination.with_name(f"{destination.name}-graphs"))
    return quantize(onnx_folder, graphs, destination, Choice(WeightFormat(), WeightFormat(), EngineSettings()), 1)
