"""What many tests share: the embedded model, small checkpoints of other shapes, and one real run of the pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES_VL = REPOSITORY / "models" / "shapes-vl"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Workspace:
    """A folder in which Snakemake runs, with the repository's Snakefile and a config.yaml of its own."""

    folder: Path

    def snakemake(self, *arguments: str, cores: int = 2, check: bool = False) -> subprocess.CompletedProcess[str]:
        command = [BIN / "snakemake", "-s", REPOSITORY / "Snakefile", "--cores", str(cores), *arguments]
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
    shutil.copyfile(REPOSITORY / "config.yaml", folder / "config.yaml")
    (folder / "models").symlink_to(REPOSITORY / "models")
    return Workspace(folder)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace in which nothing has run yet."""
    return make_workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The real pipeline on the embedded model, run once. Tests only read it."""
    made = make_workspace(tmp_path_factory.mktemp("pipeline") / "workspace")
    made.snakemake(check=True)
    return made


@pytest.fixture(scope="session")
def results(finished: Workspace) -> Path:
    """results/shapes-vl of the finished pipeline."""
    return finished.folder / "results" / "shapes-vl"


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a Qwen2-VL checkpoint with random weights of any shape, and shapes-vl's tokenizer and processor.

    `text` and `vision` override settings of the decoder and the vision tower; `tied` says whether lm_head is the
    embedding.
    """

    def make(text: dict | None = None, vision: dict | None = None, tied: bool = True, seed: int = 0) -> Path:
        import torch
        from transformers import AutoConfig, Qwen2VLForConditionalGeneration

        config = AutoConfig.from_pretrained(SHAPES_VL)
        for key, value in (text or {}).items():
            setattr(config.text_config, key, value)
        for key, value in ({"hidden_size": config.text_config.hidden_size} | (vision or {})).items():
            setattr(config.vision_config, key, value)
        config.tie_word_embeddings = tied
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
            else:
                torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.to(torch.bfloat16).save_pretrained(folder)
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "preprocessor_config.json",
            "generation_config.json",
        ):
            shutil.copyfile(SHAPES_VL / name, folder / name)
        return folder

    return make


def run_cli(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The hf2mnn command as a user starts it."""
    command = [BIN / "hf2mnn", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess]:
    return run_cli
