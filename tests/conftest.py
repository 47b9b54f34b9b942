"""Shared fixtures: the embedded model, small checkpoints of other shapes, and one real run of the pipeline."""

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

# As in the command line; torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("long")
"""Profile of `make fuzz`; see hostile.py."""
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
"""Profile of `make test`: the same examples in each run, so that only a change of the code can fail it."""
if settings.get_current_profile_name() == "default":
    settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, which workers take one by one.

    The pipeline's run is first and files that read its results are last, so that no worker waits for it. Among the
    others, files with many tests are first.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def order(path: Path) -> tuple[bool, bool, int, Path]:
        reads = any("finished" in item.fixturenames for item in files[path])
        return path.name != "test_pipeline.py", reads, -len(files[path]), path

    items[:] = [item for path in sorted(files, key=order) for item in files[path]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Workspace in which nothing has run."""
    return make_workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Function that fills a folder once for all workers of xdist, and returns it; tests must not change it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def finished(make_once: Callable[..., Path]) -> Workspace:
    """The real pipeline on the embedded model, run once for all workers of xdist. Tests only read it.

    HF2MNN_FINISHED names a workspace of an earlier run to use instead.
    """
    if "HF2MNN_FINISHED" in os.environ:
        return Workspace(Path(os.environ["HF2MNN_FINISHED"]))
    made = make_once("pipeline", lambda folder: make_workspace(folder / "ws").snakemake(check=True))
    return Workspace(made / "ws")


@pytest.fixture(scope="session")
def results(finished: Workspace) -> Path:
    """Folder results/shapes-vl of the finished pipeline."""
    return finished.folder / "results" / "shapes-vl"


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that writes a Qwen2-VL checkpoint with random weights, and the tokenizer and processor of shapes-vl.

    `text` and `vision` override settings of the decoder and the vision tower; with `tied`, lm_head is the embedding.
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
def checkpoint_folder(make_checkpoint: Callable[..., Path], make_once: Callable[..., Path]) -> Path:
    """Folder of the fetch stage of a small checkpoint with random weights, which tests only read."""
    from hf2mnn.stages.fetch import run as fetch_checkpoint

    def make(folder: Path) -> None:
        fetch_checkpoint(folder / "checkpoint", make_checkpoint(text=TEXT, vision=VISION, tied=False))

    return make_once("source", make) / "checkpoint"


@pytest.fixture(scope="session")
def onnx_folder(checkpoint_folder: Path, make_once: Callable[..., Path]) -> Path:
    """Folder of its export stage, which tests only read."""
    from hf2mnn.stages.export import run as export_onnx

    return make_once("onnx", lambda folder: export_onnx(checkpoint_folder, folder / "onnx")) / "onnx"


@pytest.fixture(scope="session")
def bundle(onnx_folder: Path, make_once: Callable[..., Path]) -> Path:
    """Its float32 bundle, which tests only read."""
    return make_once("mnn", lambda folder: float_bundle(onnx_folder, folder / "float")) / "float"


@pytest.fixture(scope="session")
def graphs(bundle: Path) -> Path:
    """Its folder of the convert stage, which tests only read."""
    return bundle.with_name("float-graphs")


@pytest.fixture(scope="session")
def model_with_heads(make_checkpoint: Callable[..., Path], make_once: Callable[..., Path]) -> Callable[[int], Path]:
    """Function that returns the stages of a tied model with so many heads for keys and values, of 4 for queries.

    The folder has checkpoint, onnx, float and float-graphs; tests only read it.
    """
    from hf2mnn.stages.export import run as export_onnx
    from hf2mnn.stages.fetch import run as fetch_checkpoint

    def get(heads: int) -> Path:
        def make(folder: Path) -> None:
            checkpoint = make_checkpoint(TEXT | {"num_key_value_heads": heads}, VISION, tied=True)
            export_onnx(fetch_checkpoint(folder / "checkpoint", checkpoint), folder / "onnx")
            float_bundle(folder / "onnx", folder / "float")

        return make_once(f"heads-{heads}", make)

    return get


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess]:
    return run_cli
