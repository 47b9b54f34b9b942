"""What many tests share: the embedded model, small checkpoints of other shapes, and one real run of the pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from support import SHAPES_VL, TEXT, VISION, Workspace, float_bundle, make_workspace, run_cli

# As the command line does it; torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("long")
"""That of `make fuzz`; see hostile.py."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers share the tests file by file, in this order: the pipeline's run begins first, what only reads it comes
    last, so that no worker waits for another's run; in between, and then, files with many tests come first.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def place(path: Path) -> tuple[bool, bool, int, Path]:
        reads = any("finished" in item.fixturenames for item in files[path])
        return path.name != "test_pipeline.py", reads, -len(files[path]), path

    items[:] = [item for path in sorted(files, key=place) for item in files[path]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace in which nothing has run yet."""
    return make_workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The real pipeline on the embedded model, run once for all of xdist's workers. Tests only read it.

    HF2MNN_FINISHED names a workspace in which it has run, to be read in place of a new one.
    """
    if "HF2MNN_FINISHED" in os.environ:
        return Workspace(Path(os.environ["HF2MNN_FINISHED"]))
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    made = Workspace(root / "pipeline")
    with FileLock(root / "pipeline.lock"):
        if not (root / "pipeline.done").exists():
            make_workspace(made.folder).snakemake(check=True)
            (root / "pipeline.done").touch()
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
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
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


@pytest.fixture(scope="session")
def checkpoint_folder(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with random weights: for the converter, the engine and the quantizer."""
    from hf2mnn.stages.fetch import run as fetch_checkpoint

    checkpoint = make_checkpoint(text=TEXT, vision=VISION, tied=False)
    return fetch_checkpoint(tmp_path_factory.mktemp("source") / "source", checkpoint)


@pytest.fixture(scope="session")
def onnx_folder(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `onnx` stage's folder. Tests only read it."""
    from hf2mnn.stages.export import run as export_onnx

    return export_onnx(checkpoint_folder, tmp_path_factory.mktemp("onnx") / "onnx")


@pytest.fixture(scope="session")
def bundle(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 bundle. Tests only read it."""
    return float_bundle(onnx_folder, tmp_path_factory.mktemp("mnn") / "float")


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess]:
    return run_cli
