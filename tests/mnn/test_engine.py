"""Bundles in MNN's engine, against PyTorch; and that what is broken about one never passes for an answer."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open

from asking import turn, write_set
from hf2mnn.core.errors import (
    BundleError,
    BundleFault,
    EngineError,
    EngineStopped,
    EvaluationSetError,
    MachineError,
    ManifestError,
)
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn import ask
from hf2mnn.mnn.ask import ask_bundle
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.reference import run as run_reference

CLOSE = 1e-4
"""Bound on logits whose deviation is about 0.6; what is measured is below 1e-5."""
LENGTH = 10
# Sides that need no resizing, and one image that is resized.
SIZES = {"wide": (224, 56), "tall": (56, 196), "square": (84, 84), "odd": (200, 75)}


user = partial(turn, SIZES)


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "三角形是什么颜色？"}],
    "wide": [user("wide", "How many purple things are there?")],
    "tall": [user("tall", "What is at the bottom left?")],
    "odd": [user("odd", "几个圆？")],
    "image-last": [user("Which thing?", "tall")],
    "two": [user("tall", "and", "wide", "Which is larger?")],
    "turns": [user("wide", "红色?"), reply("2"), user("tall", "and here?"), reply("blue"), user("Again?")],
}


@dataclass(frozen=True)
class Judged:
    """The reference, and what the bundle made of it."""

    reference: Path
    golden: Golden
    folder: Path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("evaluation"), SIZES, EXAMPLES)


@pytest.fixture(scope="session")
def judged(
    checkpoint_folder: Path, onnx_folder: Path, bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Judged:
    folder = tmp_path_factory.mktemp("judged")
    reference = run_reference(checkpoint_folder, images, folder / "reference", LENGTH, threads=1)
    made = evaluate(reference, onnx_folder, folder / "mnn", bundle, threads=1, time_limit=120)
    return Judged(reference, Golden(reference), made)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# Right answers


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_logit_is_pytorchs(judged: Judged, name: str) -> None:
    """Prefill and cached decode, at right positions: one wrong counter after an image moves logits by far more."""
    wanted = next(example for example in judged.golden.examples() if example.id == name)
    with safe_open(judged.folder / "logits.safetensors", "np") as tensors:
        found = tensors.get_tensor(name)
    assert len(found) == len(wanted.answer_ids) > 1
    assert wanted.logits.std() > 0.3
    np.testing.assert_allclose(found, wanted.logits, atol=CLOSE, rtol=0)


def test_every_greedy_answer_and_every_image_is_pytorchs(judged: Judged) -> None:
    """Token for token, by the engine's own cache."""
    answers = pd.read_parquet(judged.folder / "answers.parquet")
    assert answers["greedy_match"].tolist() == [True] * len(EXAMPLES)
    assert answers["answer"].tolist() == answers["reference"].tolist()
    summary = json.loads((judged.folder / "summary.json").read_text())
    assert summary["top1_agreement"] == summary["greedy_match"] == 1
    assert summary["mean_kld"] < 1e-8
    assert summary["vision_cosine"] > 0.999999


def test_the_engine_as_it_is_called_answers_text_alike(judged: Judged) -> None:
    """What a caller gets without our positions: the same where there is no image to count wrongly after."""
    answers = pd.read_parquet(judged.folder / "answers.parquet").set_index("id")
    assert answers.loc["text", "as_called"] == answers.loc["text", "reference"]


@pytest.mark.parametrize("name", ["text", "wide", "tall", "odd"])
def test_ask_gives_pytorchs_answer(
    judged: Judged,
    bundle: Path,
    images: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokenizer and the template in the bundle, its resizing and its decoding: the way of a user, from end to end.

    And nothing is left where it was called, or in the bundle.
    """
    monkeypatch.chdir(tmp_path)
    before = sorted(bundle.iterdir())
    paths = [images / f"{name}.png"] if name in SIZES else []
    content = EXAMPLES[name][0]["content"]
    question = content if isinstance(content, str) else content[1]["text"]
    wanted = next(record for record in judged.golden.records if record["id"] == name)
    assert ask_bundle(bundle, question, paths, max_new_tokens=LENGTH, threads=1) == wanted["answer"]
    assert not list(tmp_path.iterdir())
    assert sorted(bundle.iterdir()) == before


def test_ask_takes_two_images_and_can_leave_all_to_the_engine(bundle: Path, images: Path) -> None:
    paths = [images / "wide.png", images / "tall.png"]
    for as_called in (False, True):
        assert isinstance(ask_bundle(bundle, "Which?", paths, 3, threads=1, as_called=as_called), str)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_conversation_is_continued_as_by_pytorch(
    judged: Judged, bundle: Path, images: Path, name: str, tmp_path: Path
) -> None:
    """Several turns and images, from a file beside the images."""
    for image in images.glob("*.png"):
        (tmp_path / image.name).hardlink_to(image)
    (tmp_path / "chat.json").write_text(json.dumps(EXAMPLES[name]))
    wanted = next(record for record in judged.golden.records if record["id"] == name)
    messages, paths = ask.read_conversation(tmp_path / "chat.json")
    assert ask.continue_conversation(bundle, messages, paths, LENGTH, threads=1) == wanted["answer"]


def test_a_system_prompt_is_the_first_message(bundle: Path) -> None:
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    wanted = ask.continue_conversation(bundle, question, [], 6, threads=1)
    assert ask_bundle(bundle, "Which?", [], 6, system="Be brief.", threads=1) == wanted
    assert ask_bundle(bundle, "Which?", [], 6, threads=1) != wanted


IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a <img>x.png</img> tag", "takes '<img>x.png</img>' for a file"),
        (f"What is {IMAGE_TEXT}?", "wrote 1 images for 0"),
        (5, "refuses these messages"),
    ],
)
def test_a_prompt_that_the_engine_would_misread_is_refused(bundle: Path, content: Any, said: str) -> None:
    with pytest.raises(EvaluationSetError, match=said):
        ask.continue_conversation(bundle, [{"role": "user", "content": content}], [])


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("[", "is not a conversation"),
        ('{"messages": []}', "messages are a list"),
        ("[]", "holds no messages"),
        ('[{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]', "has no input for"),
        ('[{"role": "user", "content": [{"type": "image", "image": "../a.png"}]}]', "is not a conversation"),
    ],
)
def test_what_is_no_conversation_is_refused(stored: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(stored)
    with pytest.raises(EvaluationSetError, match=said):
        ask.read_conversation(tmp_path / "chat.json")
    with pytest.raises(EvaluationSetError, match="there is no conversation"):
        ask.read_conversation(tmp_path / "nowhere.json")


# Broken bundles


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def refuse_to_run(*_: object) -> None:
    pytest.fail("the engine was started on a bundle that is not whole")


@pytest.mark.parametrize(
    "name", ["llm.mnn", "llm.mnn.weight", "visual.mnn", "visual.mnn.weight", "tokenizer.mtok", "embeddings_bf16.bin"]
)
@pytest.mark.parametrize("spoil", [Path.unlink, empty, truncate, point])
def test_a_bundle_that_is_not_whole_is_refused_before_the_engine_sees_it(
    copy: Path, name: str, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine loads it: half the weights give all-zero logits ("!!!!!!"), half an embedding plausible words, and
    half a tokenizer fills the machine's memory.
    """
    monkeypatch.setattr(ask, "run_worker", refuse_to_run)
    spoil(copy / name)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        ask_bundle(copy, "?", [])


@pytest.mark.parametrize("name", ["config.json", "llm_config.json"])
def test_a_bundle_without_its_configs_is_refused(copy: Path, name: str) -> None:
    """Without llm_config.json the engine loads too, and answers with wrong logits."""
    for content in ("{", None):
        (copy / name).write_text(content) if content else (copy / name).unlink()
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            check_bundle(copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        ask_bundle(tmp_path / "nowhere", "?", [])
    with pytest.raises(BundleError, match="there is no bundle"):
        ask_bundle(tmp_path, "?", [])


def test_a_bundle_of_another_maker_is_refused_in_a_sentence(copy: Path) -> None:
    """It has no manifest, or one that vouches for other facts: either way a sentence, before the engine starts."""
    content = json.loads((copy / "llm_config.json").read_text())
    del content["hf2mnn"]
    (copy / "llm_config.json").write_text(json.dumps(content))
    vouch(copy)
    with pytest.raises(BundleError, match="not made by hf2mnn"):
        ask_bundle(copy, "?", [])
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        ask_bundle(copy, "?", [])


def vouch(folder: Path) -> None:
    """A manifest that says the files are right: what a bug in a stage, not an accident, would leave."""
    manifest = Manifest.load(folder)
    manifest.folder = None
    manifest.save(folder)


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(1).integers(0, 256, path.stat().st_size, dtype=np.uint8).tobytes())


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["llm.mnn.weight", "embeddings_bf16.bin"])
def test_random_weights_are_garbage(copy: Path, name: str) -> None:
    """Finite numbers of 1e38, which no check for NaN sees."""
    noise(copy / name)
    vouch(copy)
    with pytest.raises(EngineError, match="garbage"):
        ask_bundle(copy, "?", [], max_new_tokens=3, threads=1)


def test_weights_of_nothing_are_garbage(copy: Path) -> None:
    """All logits equal: no model says so, and argmax would answer with the first token for ever."""
    zeros(copy / "llm.mnn.weight")
    vouch(copy)
    with pytest.raises(EngineError, match="garbage"):
        ask_bundle(copy, "?", [], max_new_tokens=3, threads=1)


def test_evaluation_verifies_every_byte(judged: Judged, onnx_folder: Path, copy: Path, tmp_path: Path) -> None:
    """A weight file of the right size and other contents."""
    zeros(copy / "visual.mnn.weight")
    with pytest.raises(ManifestError, match=r"visual\.mnn\.weight is not the file that was made"):
        evaluate(judged.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=60)
    assert not (tmp_path / "out").exists()


def test_a_vision_tower_of_another_model_gets_a_bad_verdict(
    judged: Judged, onnx_folder: Path, copy: Path, tmp_path: Path
) -> None:
    """Plausible weights that are not its own pass every check of files; the comparison with PyTorch sees them."""
    weights = np.fromfile(copy / "visual.mnn.weight", np.float32)
    np.random.default_rng(0).shuffle(weights)
    weights.tofile(copy / "visual.mnn.weight")
    vouch(copy)
    made = evaluate(judged.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=120)
    summary = json.loads((made / "summary.json").read_text())
    assert summary["vision_cosine"] < 0.5
    assert summary["greedy_match"] < 0.5
    assert summary["mean_kld"] > 0.01
    # Text is answered as before: the figures tell the parts apart.
    positions = pd.read_parquet(made / "metrics.parquet")
    assert positions[~positions["after_image"]]["kld"].max() < 1e-8


def resize(bundle: Path, hidden: int) -> None:
    content = json.loads((bundle / "llm_config.json").read_text())
    content["hidden_size"] = hidden
    (bundle / "llm_config.json").write_text(json.dumps(content))


def test_a_crash_of_the_engine_is_an_error_with_its_last_words(copy: Path) -> None:
    """A wrong size in its configuration ends the engine by a segmentation fault; ours goes on."""
    resize(copy, 64)
    vouch(copy)
    with pytest.raises(EngineError, match=r"died \(signal 11\) during ask; its last words: .*Reshape"):
        ask_bundle(copy, "a longer question", [], max_new_tokens=3, threads=1)


def test_a_graph_that_the_engine_does_not_load_is_an_error(copy: Path) -> None:
    noise(copy / "llm.mnn")
    vouch(copy)
    with pytest.raises(EngineError, match="does not load"):
        ask_bundle(copy, "?", [], max_new_tokens=3, threads=1)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda bundle: noise(bundle / "llm.mnn"), "does not load"),
        (lambda bundle: noise(bundle / "llm.mnn.weight"), "answers garbage"),
        (lambda bundle: resize(bundle, 64), r"died \(signal 11\) during evaluate"),
    ],
    ids=["refused", "garbage", "crash"],
)
def test_a_bundle_that_does_not_run_is_a_row_without_figures(
    judged: Judged, onnx_folder: Path, copy: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    """One bad variant does not end the run: what the engine says of it goes into the table, and no good figure does."""
    spoil(copy)
    vouch(copy)
    made = evaluate(judged.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=60)
    summary = json.loads((made / "summary.json").read_text())
    assert re.search(says, summary["fault"])
    counted = {"fault", "bytes", "positions", "examples", "labelled"}
    assert {name for name, value in summary.items() if value is not None} == counted
    assert (summary["positions"], summary["examples"]) == (0, len(EXAMPLES))
    assert Manifest.load(made).results["fault"] == summary["fault"]
    # Every file that a sound bundle's evaluation has is there, so that the report can read it.
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in judged.folder.iterdir())


def test_a_bundle_that_runs_has_no_fault(judged: Judged) -> None:
    assert json.loads((judged.folder / "summary.json").read_text())["fault"] is None


def test_an_engine_that_takes_too_long_is_stopped(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"stopped after .*\(ask\)"):
        ask_bundle(bundle, "?", [], time_limit=0.05)


def test_an_evaluation_that_was_stopped_is_no_verdict_on_the_bundle(
    judged: Judged, onnx_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    """It took longer than it may, on this machine and today: an error, and no row of the table."""
    with pytest.raises(EngineError, match="stopped after") as stopped:
        evaluate(judged.reference, onnx_folder, tmp_path / "out", bundle, threads=1, time_limit=0.05)
    assert not isinstance(stopped.value, BundleFault)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (signal.SIGKILL, EngineStopped, r"\(ending\) was killed \(signal 9\).*out of memory"),
        (signal.SIGTERM, EngineStopped, r"\(ending\) was stopped from outside \(signal 15\)"),
        (signal.SIGSEGV, BundleFault, r"died \(signal 11\) during ending"),
        (signal.SIGABRT, BundleFault, r"died \(signal 6\) during ending"),
    ],
)
def test_a_killed_engine_is_told_from_one_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, kind: type[EngineError], words: str
) -> None:
    """Nothing in a bundle sends SIGKILL, that is a machine short of memory; nor SIGTERM, that is a scheduler."""
    (tmp_path / "ending.py").write_text("import os\n\n\ndef run(job):\n    os.kill(os.getpid(), job['signal'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=words) as died:
        run_worker("ending", {"signal": how.value}, 60)
    assert type(died.value) is kind


def test_a_task_that_the_worker_does_not_have_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"sing.*this is a bug"):
        run_worker("sing", {}, 60)


def test_a_file_that_is_no_image_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(EvaluationSetError, match=r"x\.png is not an image"):
        ask_bundle(bundle, "?", [tmp_path / "x.png"])
    with pytest.raises(EvaluationSetError, match="there is no image"):
        ask_bundle(bundle, "?", [tmp_path / "nowhere.png"])


def test_a_image_like_a_thread_is_refused_as_by_the_processor(bundle: Path, tmp_path: Path) -> None:
    """Transformers takes none of more than 200 to 1, so there is nothing that the answer could be equal to."""
    Image.new("RGB", (900, 3)).save(tmp_path / "thread.png")
    with pytest.raises(EvaluationSetError, match="900 x 3"):
        ask_bundle(bundle, "?", [tmp_path / "thread.png"])


def test_an_engine_without_room_is_no_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine lacks is told as everywhere, not as a bug to report."""
    program = "import errno\n\n\ndef run(job):\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
    (tmp_path / "filling.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MachineError, match="is full") as failed:
        run_worker("filling", {"result": str(tmp_path / "result")}, 60)
    assert "bug" not in str(failed.value)
