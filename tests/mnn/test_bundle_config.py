"""Files that the configuration of an untrusted bundle makes the engine open, and settings that users edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf2mnn.core.errors import BundleError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.bundle import CONFIG, MODEL_CONFIG
from hf2mnn.mnn.bundle_config import EngineSettings, Settings, edited_settings, verify_bundle, written_config
from hf2mnn.mnn.engine import check_bundle
from hf2mnn.mnn.engine_facts import RUN_TIME_SETTINGS
from support import REPOSITORY


def bundle(folder: Path, config: Any, model: Any = None) -> Path:
    """Write a bundle with a valid manifest, which the author of an untrusted bundle can write too."""
    folder.mkdir()
    for name, content in ((CONFIG, config), (MODEL_CONFIG, model or {})):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "llm.mnn").write_bytes(b"x")
    Manifest("quantize").save(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"llm_model": "../llm.mnn"}, {}),
        ({"tokenizer_file": "/etc/passwd"}, {}),
        ({"llm_model": "llm.mnn"}, {"embedding_file": "a/../../secret"}),
        ({"mllm": {"visual_model": "../visual.mnn"}}, {}),
        ({"tmp_path": "/var/tmp", "use_mmap": True}, {}),
        ({"prefix_cache_path": "../../cache"}, {}),
        ({"base_dir": "/"}, {}),
        ({}, {"base_dir": "."}),
        ({"llm_model": 1}, {}),
        ({"llm_weight": "x" * 5000}, {}),
        ("[]", {}),
        ('{"llm_model": "llm.mnn", "llm_model": "other.mnn"}', {}),
    ],
)
def test_paths_outside_the_bundle_are_rejected(config: Any, model: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        check_bundle(bundle(tmp_path / "bundle", config, model))
    assert str(tmp_path / "bundle") in str(error.value)


def test_links_out_of_the_bundle_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    folder = bundle(tmp_path / "bundle", {"tokenizer_file": "tokenizer.txt"})
    (folder / "tokenizer.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(BundleError, match="is a link to"):
        check_bundle(folder)


def test_paths_inside_the_bundle_are_accepted(tmp_path: Path) -> None:
    config = {"llm_model": "llm.mnn", "tmp_path": "", "mllm": {"visual_model": "parts/visual.mnn"}}
    assert check_bundle(bundle(tmp_path / "bundle", config)).folder == (tmp_path / "bundle").resolve()


# Edited settings

ENGINE = {"precision": "low", "memory": "low", "threads": 4}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A bundle as the quantize stage leaves it, apart from its graphs."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(written_config(EngineSettings(**ENGINE), vision=False, embedding=False)))
    (folder / MODEL_CONFIG).write_text("{}")
    (folder / "llm.mnn").write_bytes(b"x")
    Manifest("quantize", settings={"engine": ENGINE}).save(folder)
    return folder


def edit(folder: Path, **settings: Any) -> Path:
    """Change keys of config.json; None removes a key."""
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("settings", "edits"),
    [
        ({"thread_num": 1}, {"thread_num": "4 -> 1"}),
        ({"thread_num": None}, {"thread_num": "4 -> default"}),
        ({"sampler_type": "mixed", "temperature": 1}, {"sampler_type": '"greedy" -> "mixed"', "temperature": None}),
        ({"jinja": {"context": {"enable_thinking": False}}}, {"jinja.context.enable_thinking": "default -> false"}),
        ({"mllm": {"precision": "high"}}, {"mllm.precision": '"low" -> "high"', "mllm.thread_num": "4 -> default"}),
        ({"system_prompt": "简短"}, {"system_prompt": 'default -> "简短"'}),
        ({"logit_bias": {"5": 1}, "use_mmap": True, "tmp_path": "cache"}, {"logit_bias.5": "default -> 1"}),
        ({"max_new_tokens": 512}, {}),
    ],
)
def test_run_time_settings_may_be_edited(settings: dict[str, Any], edits: dict[str, Any], made: Path) -> None:
    """The bundle stays valid, and its digest shows that its figures are those of other settings."""
    before = Manifest.load(made)
    edited = edited_settings(Manifest.load(edit(made, **settings)))
    assert {key: edited[key] if text else None for key, text in edits.items()} == edits
    assert bool(edited) == bool(edits)
    verdict = verify_bundle(made)
    assert verdict.intact and verdict.edited == edited
    checked = check_bundle(made)
    assert (checked.digest() != before.digest()) == bool(edits)
    assert Manifest.load(made).outputs == before.outputs, "nothing is written"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"thread_num": "4"}, "thread_num: input should be a valid integer, not '4'"),
        ({"thread_num": 0}, "thread_num: input should be greater than 0"),
        ({"reuse_kv": 1}, "reuse_kv: input should be a valid boolean"),
        ({"thred_num": 4}, "thred_num: there is no such key; did you mean 'thread_num'?"),
        ({"mllm": {"precision": "hgih"}}, "mllm.precision: 'hgih' is not one of"),
        ({"mllm": {"sampler_type": "greedy"}}, "mllm.sampler_type: there is no such key"),
        ({"jinja": {"chat_template": "x"}}, "jinja.chat_template: there is no such key"),
        ({"hidden_size": 64}, "hidden_size: there is no such key"),
        ({"llm_model": "visual.mnn"}, 'llm_model is "visual.mnn" in place of "llm.mnn"'),
        ({"tokenizer_file": None}, 'tokenizer_file is null in place of "tokenizer.mtok"'),
    ],
)
def test_other_changes_are_damage_with_the_key(settings: dict[str, Any], problem: str, made: Path) -> None:
    edit(made, **settings)
    verdict = verify_bundle(made)
    assert verdict.damaged[CONFIG].startswith("was changed: ") and problem in verdict.damaged[CONFIG]
    with pytest.raises(BundleError) as refused:
        check_bundle(made)
    assert str(made / CONFIG) in str(refused.value) and problem in str(refused.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{\n "thread_num": 1', "line 2 column 17"),
        (b'{\n"thread_num": 1,\n"thread_num": 2}', "'thread_num' twice, in lines 2 and 3"),
        (b"[]", "no JSON object"),
    ],
)
def test_files_that_the_engine_would_not_read_as_meant_are_damage(content: bytes, problem: str, made: Path) -> None:
    (made / CONFIG).write_bytes(content)
    assert problem in verify_bundle(made).damaged[CONFIG]
    with pytest.raises(BundleError, match=problem):
        check_bundle(made)


def test_an_edit_hides_no_damage_of_other_files(made: Path) -> None:
    edit(made, thread_num=1)
    (made / MODEL_CONFIG).write_text("{ }")
    assert list(verify_bundle(made).damaged) == [MODEL_CONFIG]
    with pytest.raises(BundleError, match=MODEL_CONFIG):
        check_bundle(made)


def test_only_bundles_may_be_edited(tmp_path: Path) -> None:
    """A checkpoint has a config.json too."""
    (tmp_path / CONFIG).write_text('{"thread_num": 4}')
    Manifest("fetch", settings={"engine": ENGINE}).save(tmp_path)
    (tmp_path / CONFIG).write_text('{"thread_num": 1}')
    assert list(verify_bundle(tmp_path).damaged) == [CONFIG]


def test_written_settings_are_run_time_settings() -> None:
    written = written_config(EngineSettings(), vision=True, embedding=True)
    files = {"llm_config", "llm_model", "llm_weight", "tokenizer_file", "visual_model", "embedding_file"}
    assert written.keys() - RUN_TIME_SETTINGS.keys() == files
    Settings.model_validate({key: value for key, value in written.items() if key not in files})


def test_the_documentation_lists_all_settings() -> None:
    text = (REPOSITORY / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert [key for key in RUN_TIME_SETTINGS if f"`{key}`" not in text] == []
