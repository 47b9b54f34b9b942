"""Bundles in MNN's engine against PyTorch, and faulty bundles, which must never give a plausible result."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer

from asking import turn, write_set
from hf2mnn.core.errors import (
    BundleError,
    BundleFault,
    EngineError,
    EngineStopped,
    EvaluationSetError,
    MachineError,
)
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn import ask
from hf2mnn.mnn.ask import ask_bundle, continue_conversation, read_conversation, read_tools
from hf2mnn.mnn.bundle import TOKENIZER
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.tokenizer_file import read_tokenizer
from hf2mnn.reference.golden import Golden
from hf2mnn.stages.evaluate import run as evaluate
from hf2mnn.stages.reference import run as run_reference

TOLERANCE = 1e-4
"""Bound on the error of logits, whose standard deviation is about 0.6; measured errors are below 1e-5."""
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
class Evaluated:
    """A reference and the evaluation of the float32 bundle against it."""

    reference: Path
    golden: Golden
    folder: Path

    def answer(self, name: str) -> str:
        """Answer of PyTorch to an example."""
        return next(record["answer"] for record in self.golden.records if record["id"] == name)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("evaluation"), SIZES, EXAMPLES)


@pytest.fixture(scope="session")
def evaluated(
    checkpoint_folder: Path, onnx_folder: Path, bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    reference = run_reference(checkpoint_folder, images, folder / "reference", LENGTH, threads=1)
    result = evaluate(reference, onnx_folder, folder / "mnn", bundle, threads=1, time_limit=120, keep_logits=True)
    return Evaluated(reference, Golden(reference), result)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# Right answers --------------------------------------------------------------------------------------------------------


def test_logits_equal_pytorch(evaluated: Evaluated) -> None:
    """Prefill and cached decoding at right positions: one wrong counter after an image moves logits by far more."""
    with safe_open(evaluated.folder / "logits.safetensors", "np") as tensors:
        for example in evaluated.golden.examples():
            logits = tensors.get_tensor(example.id)
            assert len(logits) == len(example.answer_ids) > 1
            assert example.logits.std() > 0.3
            np.testing.assert_allclose(logits, example.logits, atol=TOLERANCE, rtol=0, err_msg=example.id)


def test_answers_and_images_equal_pytorch(evaluated: Evaluated) -> None:
    """Token for token, by the engine's own KV cache."""
    answers = pd.read_parquet(evaluated.folder / "answers.parquet").set_index("id")
    assert answers["greedy_match"].tolist() == [True] * len(EXAMPLES)
    assert answers["answer"].tolist() == answers["reference"].tolist()
    # As called, without an image before which positions could be wrong.
    assert answers.loc["text", "as_called"] == answers.loc["text", "reference"]
    summary = json.loads((evaluated.folder / "summary.json").read_text())
    assert summary["top1_agreement"] == summary["greedy_match"] == 1
    assert summary["mean_kld"] < 1e-8
    assert summary["vision_cosine"] > 0.999999
    assert summary["fault"] is None


def test_ask_equals_pytorch(
    evaluated: Evaluated, bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizer and template of the bundle, resizing and decoding, from end to end; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    before = sorted(bundle.iterdir())
    question = EXAMPLES["odd"][0]["content"][1]["text"]
    answer = ask_bundle(bundle, question, [images / "odd.png"], max_new_tokens=LENGTH, threads=1)
    assert answer == evaluated.answer("odd")
    assert not list(tmp_path.iterdir())
    assert sorted(bundle.iterdir()) == before


def test_ask_as_called_accepts_two_images(bundle: Path, images: Path) -> None:
    paths = [images / "wide.png", images / "tall.png"]
    assert isinstance(ask_bundle(bundle, "Which?", paths, 3, threads=1, as_called=True), str)


@pytest.mark.parametrize("name", ["text", "image-last", "two", "turns"])
def test_conversations_equal_pytorch(
    evaluated: Evaluated, bundle: Path, images: Path, name: str, tmp_path: Path
) -> None:
    """Several turns and images, from a file beside the images."""
    for image in images.glob("*.png"):
        (tmp_path / image.name).hardlink_to(image)
    (tmp_path / "chat.json").write_text(json.dumps(EXAMPLES[name]))
    messages, paths = read_conversation(tmp_path / "chat.json")
    assert continue_conversation(bundle, messages, paths, LENGTH, threads=1) == evaluated.answer(name)


def test_system_prompt_is_first_message(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []

    def record(task: str, job: dict[str, Any], time_limit: float) -> None:
        prompts.append(job["prompt"])
        Path(job["result"]).write_text('{"text": ""}')

    monkeypatch.setattr(ask, "run_worker", record)
    continue_conversation(
        bundle, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}], []
    )
    ask_bundle(bundle, "Which?", [], system="Be brief.")
    ask_bundle(bundle, "Which?", [])
    assert prompts[0] == prompts[1] != prompts[2]


def test_edited_settings_hold_for_questions(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """System prompt, length of the answer, and variables of the template; an option overrides the first two."""
    jobs: list[dict[str, Any]] = []

    def record(task: str, job: dict[str, Any], time_limit: float) -> None:
        jobs.append(job)
        Path(job["result"]).write_text('{"text": ""}')

    monkeypatch.setattr(ask, "run_worker", record)
    ask_bundle(copy, "Which?", [], system="Be brief.")
    config = json.loads((copy / "config.json").read_text())
    changes = {"max_new_tokens": 3, "system_prompt": "Be brief.", "jinja": {"context": {"enable_thinking": False}}}
    (copy / "config.json").write_text(json.dumps(config | changes))
    ask_bundle(copy, "Which?", [])
    ask_bundle(copy, "Which?", [], 5, system="Be long.")
    assert [job["max_new_tokens"] for job in jobs] == [512, 3, 5]
    assert jobs[0]["prompt"] == jobs[1]["prompt"] != jobs[2]["prompt"] and "Be brief." not in jobs[2]["prompt"]
    monkeypatch.setattr(ask, "render", lambda template, messages, variables, tools: str(variables["enable_thinking"]))
    with pytest.raises(EvaluationSetError, match="0 times, for 1 images"):
        ask_bundle(copy, "Which?", [copy])
    ask_bundle(copy, "Which?", [])
    assert jobs[3]["prompt"] == "False"


IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a <img>x.png</img> tag", "takes '<img>x.png</img>' in a message for a file"),
        ("a\0b", "the engine cannot read these messages: a text has U\\+0000"),
        ("a \udcff", "is no character"),
        (f"What is {IMAGE_TEXT}?", r"the marker <\|image_pad\|> 1 times, for 0 images"),
        ("What is <|image_pad|> here?", r"the marker <\|image_pad\|> 1 times, for 0 images"),
        ("What is <|video_pad|> here?", r"the marker <\|video_pad\|> 1 times, for 0 images"),
        (5, "rejects these messages"),
    ],
)
def test_prompts_that_the_engine_misreads_are_rejected(bundle: Path, content: Any, message: str) -> None:
    with pytest.raises(EvaluationSetError, match=message):
        continue_conversation(bundle, [{"role": "user", "content": content}], [])


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"z": {"type": "string"}, "a": "é <b>"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"z": 1}}}]}


def test_tools_are_rendered_as_transformers_does(
    bundle: Path, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gets the text: its own template would write keys in another order."""
    template = (Path(__file__).parent / "templates" / "qwen2.5.jinja").read_text()
    stored, prompts = read_tokenizer(bundle / TOKENIZER), []

    def record(task: str, job: dict[str, Any], time_limit: float) -> None:
        prompts.append(job["prompt"])
        Path(job["result"]).write_text('{"text": ""}')

    monkeypatch.setattr(ask, "run_worker", record)
    monkeypatch.setattr(ask, "read_tokenizer", lambda _: replace(stored, template=template))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "chat.json").write_text(
        json.dumps([{"role": "user", "content": "Look"}, CALL, {"role": "tool", "content": "1"}])
    )
    messages, _ = read_conversation(tmp_path / "chat.json")
    continue_conversation(bundle, messages, [], tools=read_tools(tmp_path / "tools.json"))
    ask_bundle(bundle, "Look", [], tools=TOOLS)
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    tokenizer.chat_template = template
    chats = [messages, messages[:1]]
    assert prompts == [
        tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    with pytest.raises(EvaluationSetError, match="leave out --as-called or --tools"):
        ask_bundle(bundle, "Look", [], tools=TOOLS, as_called=True)


def test_tools_that_no_template_writes_are_refused(bundle: Path) -> None:
    with pytest.raises(EvaluationSetError, match="does not write tools; omit --tools"):
        ask_bundle(bundle, "Look", [], tools=TOOLS)


def test_markers_in_tools_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = read_tokenizer(bundle / TOKENIZER)
    monkeypatch.setattr(ask, "read_tokenizer", lambda _: replace(stored, template="{{ tools }}"))
    with pytest.raises(EvaluationSetError, match="in a message for a file"):
        ask_bundle(bundle, "Look", [], tools=[{"name": "<img>/etc/passwd</img>"}])


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1]"])
def test_invalid_tools_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(EvaluationSetError, match=r"tools\.json holds no tools"):
        read_tools(tmp_path / "tools.json")
    with pytest.raises(EvaluationSetError, match="there is no file of tools"):
        read_tools(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("[", "is not a conversation"),
        ('{"messages": []}', "messages must be a list"),
        ("[]", "holds no messages"),
        ('[{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]', "a video, which MNN"),
        ('[{"role": "user", "content": [{"type": "image", "image": "../a.png"}]}]', "is not a conversation"),
    ],
)
def test_invalid_conversations_are_rejected(stored: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(stored)
    with pytest.raises(EvaluationSetError, match=message):
        read_conversation(tmp_path / "chat.json")
    with pytest.raises(EvaluationSetError, match="there is no conversation"):
        read_conversation(tmp_path / "nowhere.json")


# Faulty bundles -------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def engine_started(*_: object) -> None:
    pytest.fail("the engine was started on an incomplete bundle")


@pytest.mark.parametrize(
    "name", ["llm.mnn", "llm.mnn.weight", "visual.mnn", "visual.mnn.weight", "tokenizer.mtok", "embeddings_bf16.bin"]
)
def test_incomplete_bundles_are_rejected_before_the_engine_starts(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine loads them.

    Half the weights give logits of zero ("!!!!!!"), half an embedding plausible words, and half a tokenizer fills the
    memory.
    """
    monkeypatch.setattr(ask, "run_worker", engine_started)
    content = (copy / name).read_bytes()
    for damage in (Path.unlink, empty, truncate, lfs_pointer):
        damage(copy / name)
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            ask_bundle(copy, "?", [])
        (copy / name).write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "llm_config.json"])
def test_bundles_without_configuration_are_rejected(copy: Path, name: str) -> None:
    """Without llm_config.json the engine loads, and its logits are wrong."""
    for content in ("{", None):
        (copy / name).write_text(content) if content else (copy / name).unlink()
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            check_bundle(copy)


def test_folder_without_a_bundle_is_rejected(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BundleError, match="there is no bundle"):
            ask_bundle(folder, "?", [])


def test_bundle_of_another_tool_is_rejected(copy: Path) -> None:
    content = json.loads((copy / "llm_config.json").read_text())
    del content["hf2mnn"]
    (copy / "llm_config.json").write_text(json.dumps(content))
    write_manifest(copy)
    with pytest.raises(BundleError, match=r"llm_config\.json has no key hf2mnn"):
        ask_bundle(copy, "?", [])
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        ask_bundle(copy, "?", [])


def write_manifest(folder: Path) -> None:
    """Write a manifest of the present files, as after a bug in a stage."""
    manifest = Manifest.load(folder)
    manifest.folder = None
    manifest.save(folder)


def randomize(path: Path) -> None:
    path.write_bytes(np.random.default_rng(1).integers(0, 256, path.stat().st_size, dtype=np.uint8).tobytes())


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(("name", "damage"), [("embeddings_bf16.bin", randomize), ("llm.mnn.weight", zeros)])
def test_wrong_weights_are_garbage(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    """Finite numbers of 1e38, which pass a check for NaN, and equal logits, whose best token is always the first."""
    damage(copy / name)
    write_manifest(copy)
    with pytest.raises(BundleFault, match="garbage") as fault:
        ask_bundle(copy, "?", [], max_new_tokens=3, threads=1)
    assert (fault.value.kind, fault.value.ended) == ("garbage", "")


def test_evaluation_verifies_every_byte(evaluated: Evaluated, onnx_folder: Path, copy: Path, tmp_path: Path) -> None:
    """A weight file of the right size with other contents."""
    zeros(copy / "visual.mnn.weight")
    with pytest.raises(BundleError, match=r"visual\.mnn\.weight differs from its entry"):
        evaluate(evaluated.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=60)
    assert not (tmp_path / "out").exists()


def test_vision_tower_of_another_model_has_bad_figures(
    evaluated: Evaluated, onnx_folder: Path, copy: Path, tmp_path: Path
) -> None:
    """Plausible weights of another model pass every check of files; only the comparison with PyTorch detects them."""
    weights = np.fromfile(copy / "visual.mnn.weight", np.float32)
    np.random.default_rng(0).shuffle(weights)
    weights.tofile(copy / "visual.mnn.weight")
    write_manifest(copy)
    result = evaluate(evaluated.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=120)
    summary = json.loads((result / "summary.json").read_text())
    assert summary["vision_cosine"] < 0.5
    assert summary["greedy_match"] < 0.5
    assert summary["mean_kld"] > 0.01
    # Answers to text are unchanged: the figures separate the parts.
    positions = pd.read_parquet(result / "metrics.parquet")
    assert positions[~positions["after_image"]]["kld"].max() < 1e-8


def set_hidden_size(bundle: Path, hidden: int) -> None:
    content = json.loads((bundle / "llm_config.json").read_text())
    content["hidden_size"] = hidden
    (bundle / "llm_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: randomize(bundle / "llm.mnn"), "does not load"),
        (lambda bundle: randomize(bundle / "llm.mnn.weight"), "answers garbage"),
        (lambda bundle: set_hidden_size(bundle, 64), r"died \(signal 11\) during evaluate; its last output: .*Reshape"),
    ],
    ids=["load", "garbage", "crash"],
)
def test_faulty_bundle_gets_a_row_without_figures(
    evaluated: Evaluated,
    onnx_folder: Path,
    copy: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    """One faulty variant does not end the run: the table shows the engine's error and no figures."""
    damage(copy)
    write_manifest(copy)
    result = evaluate(evaluated.reference, onnx_folder, tmp_path / "out", copy, threads=1, time_limit=60)
    summary = json.loads((result / "summary.json").read_text())
    assert re.search(message, summary["fault"])
    counts = {"fault", "bytes", "positions", "examples", "labelled"}
    assert {name for name, value in summary.items() if value is not None} == counts
    assert (summary["positions"], summary["examples"]) == (0, len(EXAMPLES))
    assert Manifest.load(result).results["fault"] == summary["fault"]
    # The report reads the files that the evaluation of any bundle has.
    files = {path.name for path in evaluated.folder.iterdir()} - {"logits.safetensors"}
    assert {path.name for path in result.iterdir()} == files


def test_stopped_evaluation_is_no_fault_of_the_bundle(
    evaluated: Evaluated, onnx_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    """The time limit depends on the machine: an error, and no row of the table."""
    with pytest.raises(EngineStopped, match=r"stopped after .*\(evaluate\)"):
        evaluate(evaluated.reference, onnx_folder, tmp_path / "out", bundle, threads=1, time_limit=0.05)
    assert not (tmp_path / "out").exists()


# The child process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a task with the given body of `run(job)` and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> str:
        (tmp_path / "ending.py").write_text(f"import errno, os\n\n\ndef run(job):\n    {body}\n")
        return "ending"

    return write


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (signal.SIGKILL, EngineStopped, r"\(ending\) was killed \(signal 9\).*out of memory"),
        (signal.SIGTERM, EngineStopped, r"\(ending\) was stopped from outside \(signal 15\)"),
        (signal.SIGSEGV, BundleFault, r"died \(signal 11\) during ending"),
        (signal.SIGABRT, BundleFault, r"died \(signal 6\) during ending"),
    ],
)
def test_killed_engine_and_crashed_engine_differ(
    task: Callable[[str], str], how: signal.Signals, kind: type[EngineError], message: str
) -> None:
    """Nothing in a bundle sends SIGKILL (a machine out of memory) or SIGTERM (a scheduler)."""
    name = task("os.write(1, b'bug: printed\\n'); os.kill(os.getpid(), job['signal'])")
    with pytest.raises(EngineError, match=message) as error:
        run_worker(name, {"signal": how.value}, 60)
    assert type(error.value) is kind
    if isinstance(error.value, BundleFault):
        fault = error.value
        assert (fault.kind, fault.ended, fault.output) == ("crash", f"signal {how.value}", ["bug: printed"])


def test_output_of_the_engine_is_no_status(task: Callable[[str], str]) -> None:
    """Native code prints to the same stdout; only the status file counts."""
    run_worker(task("print('refused: x\\nmachine: x\\nbug: x')"), {}, 60)


def test_errors_of_the_task_and_the_machine_differ(task: Callable[[str], str], tmp_path: Path) -> None:
    """A full disk has the same message as in every stage, and is no bug to report."""
    name = task("raise OSError(errno.ENOSPC, 'No space left on device')")
    with pytest.raises(MachineError, match="is full") as error:
        run_worker(name, {"result": str(tmp_path / "result")}, 60)
    assert "bug" not in str(error.value)
    with pytest.raises(EngineError, match=r"sing.*this is a bug"):
        run_worker("hf2mnn.mnn.worker.sing", {}, 60)


def test_file_that_is_no_image_is_rejected(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(EvaluationSetError, match=r"x\.png is not an image"):
        ask_bundle(bundle, "?", [tmp_path / "x.png"])
    with pytest.raises(EvaluationSetError, match="there is no image"):
        ask_bundle(bundle, "?", [tmp_path / "nowhere.png"])


def test_too_long_image_is_rejected_as_by_the_processor(bundle: Path, tmp_path: Path) -> None:
    """The processor of transformers rejects images of more than 200 to 1, so there is no answer to compare with."""
    Image.new("RGB", (900, 3)).save(tmp_path / "long.png")
    with pytest.raises(EvaluationSetError, match="900 x 3"):
        ask_bundle(bundle, "?", [tmp_path / "long.png"])
