"""The `source` stage: from a folder, and from hubs that are a real HTTP server on this machine (`hub_server`)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hf2mnn.checkpoint.fetch import AdapterSource
from hf2mnn.checkpoint.hub import base as hubs
from hf2mnn.checkpoint.hub.base import pin_repository
from hf2mnn.checkpoint.synth import Shape, make_checkpoint_like
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.manifest import MARK, Manifest
from hf2mnn.core.progress import Progress
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hub_server import COMMIT, Served
from support import BIN, SHAPES_VL, run_cli

STRANGE = {"modeling_x.py", "pytorch_model.bin", "README.md"}
FIRST = "model-00001-of-00002.safetensors"
HUBS = ["huggingface", "modelscope"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def environment(hub: Served, tmp_path: Path) -> dict[str, str]:
    """What leads the clients to the server and to caches of this test."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
        "MODELSCOPE_ENDPOINT": hub.endpoint,
        "MODELSCOPE_CACHE": str(tmp_path / "ms-cache"),
        "MODELSCOPE_HOME": str(tmp_path / "ms-home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def caches(hub: Served, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process, with clients that wait for nothing."""
    import modelscope_hub._download_control
    from huggingface_hub import constants, hf_api

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    to(hub.endpoint, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{environment['HF_HOME']}/hub")
    # The client writes what it has in pieces of 10 MB; these files are smaller.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{environment['HF_HOME']}/token")
    monkeypatch.setattr(hf_api.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(modelscope_hub._download_control._DownloadControl, "sleep", lambda *_: None)


def to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hubs are at `endpoint` from now on."""
    from huggingface_hub import constants, file_download, hf_api

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refusal(tmp_path: Path, hub: str, **given: object) -> str:
    """The sentence with which the stage refuses owner/name; nothing is left of it."""
    with pytest.raises(CheckpointError) as refused:
        fetch_checkpoint(tmp_path / "results" / "source", repository="owner/name", hub=hub, **given)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "results" / "source").exists()
    return str(refused.value)


def assert_whole(folder: Path, served: Served) -> Manifest:
    """Every file that a stage reads is what the server has; no other came."""
    manifest = Manifest.load(folder)
    manifest.verify()
    assert set(manifest.outputs) == set(served.files) - STRANGE
    for name in manifest.outputs:
        assert (folder / name).read_bytes() == served.files[name]
    return manifest


def test_links_lead_to_the_originals(checkpoint: Path, tmp_path: Path) -> None:
    """A 4 GB checkpoint is not copied, and a change of it is found by the manifest."""
    folder = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    manifest = Manifest.load(folder)
    wanted = {path.name for path in checkpoint.iterdir()} - STRANGE
    assert set(manifest.outputs) == wanted == {path.name for path in folder.iterdir()} - {"manifest.json", ".hf2mnn"}
    for name in wanted:
        assert (folder / name).is_symlink()
        assert (folder / name).samefile(checkpoint / name)
        assert manifest.outputs[name]["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert (manifest.settings, manifest.paths) == ({}, {"path": str(checkpoint)})
    manifest.verify()


def test_code_and_pickles_never_arrive(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a stranger's repository holds: nothing that could run is where a stage looks."""
    (checkpoint / "config.py").touch()
    (checkpoint / "model.safetensors.py").touch()
    folder = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    arrived = {path.suffix for path in folder.iterdir() if path.name != ".hf2mnn"}
    assert arrived == {".jinja", ".json", ".safetensors"}


def test_relative_folder_is_linked_for_good(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fetch_checkpoint(Path("results/source"), Path("checkpoint"))
    monkeypatch.chdir("/")
    Manifest.load(tmp_path / "results" / "source").verify()


@pytest.mark.parametrize("old", [False, True], ids=["first time", "over an old one"])
def test_failed_fetch_leaves_what_was_there(old: bool, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "source"
    if old:
        fetch_checkpoint(target, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        fetch_checkpoint(target, checkpoint)
    assert target.exists() == old
    assert not old or (target / "config.json").exists()


def test_checkpoint_is_not_replaced_by_links_to_itself(checkpoint: Path) -> None:
    """`--path X --out X` would delete the only copy of the weights."""
    for name in STRANGE:
        (checkpoint / name).unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointError):
        fetch_checkpoint(checkpoint, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize(
    "given",
    [{}, {"path": Path("x"), "repository": "a/b"}, {"pin": Path("x"), "repository": "a/b"}],
    ids=["none", "path and repository", "pin and repository"],
)
def test_one_source_is_wanted(given: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="either a local folder or a hub repository"):
        fetch_checkpoint(tmp_path / "checkpoint", **given)


@pytest.mark.parametrize(
    "name", ["qwen", "a/b/c", "https://hub/a/b", "a/b c", "", "../x", "a/..", "-a/b", "a/b.git", "a/" + "b" * 200]
)
def test_what_is_no_repository_name_is_refused(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        fetch_checkpoint(tmp_path / "checkpoint", repository=name)
    assert len(str(refused.value).splitlines()) == 1
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["../../x", "/etc", "-x", "a b"])
def test_what_is_no_revision_is_refused(revision: str, hub: Served, caches: None, tmp_path: Path) -> None:
    """Names of revisions become paths in a cache."""
    with pytest.raises(CheckpointError, match="is not a revision"):
        fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", revision=revision)
    assert hub.asked == []


# Hubs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUBS)
def test_adapter_of_a_hub(
    name: str, checkpoint: Path, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its two files are fetched; the manifest says by which commit."""
    module = "base_model.model.model.layers.0.mlp.up_proj"
    lora = {f"{module}.lora_A.weight": np.ones((2, 128)), f"{module}.lora_B.weight": np.ones((256, 2))}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "owner/other"}
    hub.files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save({key: value.astype(np.float32) for key, value in lora.items()}),
        "adapter_model.bin": b"\x80\x04.",
        "tokenizer.json": b"{}",
    }
    place = AdapterSource(repository="owner/name", hub=name)
    manifest = Manifest.load(fetch_checkpoint(tmp_path / "checkpoint", checkpoint, adapter=place))
    manifest.verify()
    assert manifest.settings["adapter"] == {
        "hub": name,
        "repository": "owner/name",
        "revision": "main" if name == "huggingface" else "master",
        "commit": COMMIT,
    }
    assert set(manifest.provenance["adapter"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("tokenizer" in asked or ".bin" in asked for asked in hub.asked)
    if name == "huggingface":  # whose cache knows what a branch was
        to(NOWHERE, monkeypatch)
        again = Manifest.load(fetch_checkpoint(tmp_path / "again", checkpoint, adapter=place))
        assert again.digest() == manifest.digest()


@pytest.mark.parametrize("name", HUBS)
def test_revision_of_a_hub(name: str, hub: Served, environment: dict[str, str], tmp_path: Path) -> None:
    """The command as a user starts it. Only what stages read is asked for; no bar of a client is in the log."""
    made = run_cli(
        "source", "--repository", "owner/name", "--hub", name, "--out", "source", env=environment, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    manifest = assert_whole(tmp_path / "checkpoint", hub)
    branch = {"huggingface": "main", "modelscope": "master"}[name]
    assert manifest.settings == {"hub": name, "repository": "owner/name", "revision": branch, "commit": COMMIT}
    assert not [path for path in hub.asked if path.rpartition("/")[2] in STRANGE]
    assert "\r" not in made.stderr
    assert "it/s" not in made.stderr


@pytest.mark.parametrize("name", HUBS)
def test_nothing_is_downloaded_twice(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    fetch_checkpoint(tmp_path / "one", repository="owner/name", hub=name)
    hub.asked.clear()
    assert_whole(fetch_checkpoint(tmp_path / "two", repository="owner/name", hub=name), hub)
    assert len(hub.asked) == 1


def test_others_find_what_was_downloaded(hub: Served, caches: None, tmp_path: Path) -> None:
    """The cache is laid out as the client does it: its own functions have every file, by branch and by commit."""
    from huggingface_hub import snapshot_download

    fetch_checkpoint(tmp_path / "one", repository="owner/name")
    cache = os.environ["HF_HOME"] + "/hub"
    for revision in ("main", COMMIT):
        folder = Path(snapshot_download("owner/name", revision=revision, cache_dir=cache, local_files_only=True))
        assert {path.name for path in folder.iterdir()} == set(hub.files) - STRANGE


def test_what_others_have_downloaded_is_taken(hub: Served, caches: None, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("owner/name", "tokenizer.json", cache_dir=os.environ["HF_HOME"] + "/hub", endpoint=hub.endpoint)
    hub.asked.clear()
    assert_whole(fetch_checkpoint(tmp_path / "one", repository="owner/name"), hub)
    assert hub.of("tokenizer.json") == []


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        ("unknown", ["owner/name", "log in with"]),
        ("login", ["owner/name", "log in with"]),
        ("token", ["401", "log in with"]),
        ("gated", ["owner/name", "accept its terms", "log in with"]),
        ("forbidden", ["403", "log in with"]),
        ("404", ["owner/name"]),
        ("418", ["418"]),
        ("429", ["429", "wait", "run the same command again"]),
        ("500", ["500", "run the same command again"]),
        ("503", ["503", "run the same command again"]),
    ],
)
@pytest.mark.parametrize("name", HUBS)
def test_what_a_hub_refuses_is_one_sentence(
    name: str, fail: str, says: list[str], hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.fail = fail
    sentence = refusal(tmp_path, name)
    assert [part for part in says if part not in sentence] == [], sentence


@pytest.mark.parametrize("name", HUBS)
def test_how_long_a_hub_asks_to_wait_is_said(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.fail, hub.retry_after = "429", "300"
    assert "wait 300 s" in refusal(tmp_path, name)


@pytest.mark.parametrize("name", HUBS)
def test_revision_that_is_not_there(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    assert "revision 'v9'" in refusal(tmp_path, name, revision="v9")


@pytest.mark.parametrize("name", HUBS)
def test_no_hub_at_all(name: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a train: what could not be reached, and each thing that can be done about it."""
    to(NOWHERE, monkeypatch)
    sentence = refusal(tmp_path, name)
    for part in (NOWHERE, "cannot be reached", "_ENDPOINT", "--files", "run the same command again"):
        assert part in sentence


def test_repository_without_weights(hub: Served, caches: None, tmp_path: Path) -> None:
    """Downloaded well, and still no checkpoint: the sentence of the check, with the name that was given."""
    hub.files = {name: stored for name, stored in hub.files.items() if "safetensors" not in name}
    assert refusal(tmp_path, "huggingface").startswith("owner/name has no *.safetensors")


# Transfers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["slow", "cut", "corrupted", "truncated", "500", "503", "429"])
@pytest.mark.parametrize("name", HUBS)
def test_a_bad_transfer_is_made_good(name: str, way: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = [way]
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert hub.transfer == []


@pytest.mark.parametrize("name", HUBS)
def test_a_cut_transfer_goes_on_where_it_stopped(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = ["cut"]
    fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name)
    (asked,) = hub.ranges
    assert asked.startswith(f"{FIRST} bytes=")
    assert 0 < int(asked.partition("=")[2].rstrip("-")) <= len(hub.files[FIRST]) // 2


@pytest.mark.parametrize("ways", [[], ["cut"], ["cut", "whole"], ["503"]], ids=" ".join)
@pytest.mark.parametrize("name", HUBS)
def test_progress_counts_every_byte_once(
    name: str, ways: list[str], hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a transfer goes on, or begins again."""
    counted: dict[str, int] = {}

    @contextmanager
    def count(label: str, total: int, unit: str) -> Iterator[Progress]:
        assert (total, unit) == (len(hub.files[label.removeprefix("fetching ")]), "B")
        yield Counter(counted, label.removeprefix("fetching "))

    monkeypatch.setattr(hubs, "progress", count)
    hub.transfer = ways
    fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name)
    assert counted == {file: len(stored) for file, stored in hub.files.items() if file not in STRANGE}


class Counter:
    """A progress that adds up in `counted`."""

    def __init__(self, counted: dict[str, int], name: str) -> None:
        self.counted, self.name = counted, name

    def update(self, n: int = 1) -> None:
        self.counted[self.name] = self.counted.get(self.name, 0) + n


@pytest.mark.parametrize("name", HUBS)
def test_a_server_without_ranges_sends_all_again(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = ["cut", "whole"]
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("name", HUBS)
def test_a_file_that_stays_another_is_refused_and_not_kept(
    name: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.transfer = ["corrupted"] * 100
    sentence = refusal(tmp_path, name)
    assert FIRST in sentence
    assert hashlib.sha256(hub.files[FIRST]).hexdigest()[:16] in sentence
    assert "--files" in sentence
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(FIRST) and "checkpoint" not in str(path)]
    hub.transfer = []
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)


@pytest.mark.parametrize("way", ["cut", "truncated", "503"])
@pytest.mark.parametrize("name", HUBS)
def test_a_transfer_that_stays_bad_is_one_sentence(
    name: str, way: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.transfer = [way] * 1000
    sentence = refusal(tmp_path, name)
    assert FIRST in sentence
    hub.transfer = []
    hub.asked.clear()
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert hub.of("tokenizer.json") == []


def test_token_is_not_sent_where_weights_are_redirected(
    hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights lie on another host, which has no business with the token; a cut there goes on there."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect, hub.transfer = True, ["cut"]
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name"), hub)
    assert {token for there, token in hub.tokens if there} == {""}
    assert {token for there, token in hub.tokens if not there} == {"Bearer hf_secret"}
    assert len(hub.ranges) >= 1


def test_redirect_of_modelscope(hub: Served, caches: None, tmp_path: Path) -> None:
    hub.redirect = True
    assert_whole(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub="modelscope"), hub)
    assert sum(there for there, _ in hub.tokens) == 2


@pytest.mark.parametrize("name", ["huggingface", pytest.param("modelscope", marks=pytest.mark.slow)])
def test_a_killed_download_goes_on(
    name: str, hub: Served, environment: dict[str, str], small_shape: Shape, tmp_path: Path
) -> None:
    """Kill -9 in the middle of the weights; the same command asks for the rest of them, and for nothing that is there.

    They are 26 MB, for the client of Hugging Face writes in pieces of 10.
    """
    shape = replace(small_shape, text=small_shape.text | {"vocab_size": 98304})
    made = make_checkpoint_like(shape, tmp_path / "large", shards=1, tokenizer=SHAPES_VL)
    hub.files = {path.name: path.read_bytes() for path in made.iterdir() if path.name not in ("manifest.json", MARK)}
    hub.transfer = ["stalled"]
    command = [BIN / "hf2mnn", "source", "--repository", "owner/name", "--hub", name, "--out", "source"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, stderr=subprocess.DEVNULL) as running:
        assert hub.sent.wait(60)
        wait_for_part(tmp_path)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "checkpoint").exists()
    hub.asked.clear()
    again = run_cli(*command[1:], env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_whole(tmp_path / "checkpoint", hub)
    weights = "model-00001-of-00001.safetensors"
    (asked,) = hub.ranges
    assert asked.startswith(f"{weights} bytes=")
    assert 0 < int(asked.partition("=")[2].rstrip("-")) < len(hub.files[weights])
    assert hub.of("tokenizer.json") == []


def wait_for_part(folder: Path) -> None:
    """Until the first bytes of a file that is not whole are on the disk."""
    for _ in range(1000):
        if any(path.stat().st_size for path in folder.rglob("*.incomplete")):
            return
        time.sleep(0.01)
    raise AssertionError("nothing was written")


def test_two_processes_fetch_a_file_once(hub: Served, environment: dict[str, str], tmp_path: Path) -> None:
    """Two models of one repository: the second waits for what the first fetches."""
    program = """
from hf2mnn.checkpoint.hub.base import gather, hub_named, pin_repository
print(len(gather(hub_named("huggingface"), pin_repository("owner/name"))))
"""
    hub.transfer = ["slow", "slow"]
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    found = [int(process.communicate(timeout=100)[0]) for process in running]
    assert found == [len(hub.files) - len(STRANGE)] * 2
    assert len(hub.of(FIRST)) == 1


def test_full_disk_is_said_before_anything_is_downloaded(
    hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    sentence = refusal(tmp_path, "huggingface")
    assert "GB free" in sentence
    assert len(hub.asked) == 1


@pytest.mark.parametrize("name", HUBS)
def test_disk_that_fills_up_on_the_way_is_said(
    name: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf2mnn.checkpoint.hub.huggingface.http_get", full)
    monkeypatch.setattr("modelscope_hub._download._finish_download", full)
    sentence = refusal(tmp_path, name)
    assert "cannot be written" in sentence
    assert "No space left on device" in sentence
    assert "make space" in sentence


# The cache, pins, and files put in place by hand ---------------------------------------------------------------------


def break_file(path: Path) -> None:
    path = path.resolve()
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 255
    path.chmod(0o644)
    path.write_bytes(stored)


@pytest.mark.parametrize("name", HUBS)
def test_a_file_that_rots_in_the_cache_is_fetched_again(
    name: str, hub: Served, caches: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    break_file(fetch_checkpoint(tmp_path / "one", repository="owner/name", hub=name) / FIRST)
    hub.asked.clear()
    assert_whole(fetch_checkpoint(tmp_path / "two", repository="owner/name", hub=name), hub)
    assert len(hub.of(FIRST)) == 1
    assert "is removed from the cache: it has sha256" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["main", COMMIT], ids=["branch", "commit"])
@pytest.mark.parametrize("fail", ["", "503"], ids=["no network", "hub down"])
def test_whole_cache_serves_without_the_hub(
    revision: str, fail: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_checkpoint(tmp_path / "one", repository="owner/name")
    hub.fail = fail
    if not fail:
        to(NOWHERE, monkeypatch)
    manifest = assert_whole(fetch_checkpoint(tmp_path / "two", repository="owner/name", revision=revision), hub)
    assert manifest.settings["commit"] == COMMIT


def test_half_a_cache_does_not(hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = fetch_checkpoint(tmp_path / "one", repository="owner/name")
    (fetched / FIRST).resolve().unlink()
    to(NOWHERE, monkeypatch)
    assert "cannot be reached" in refusal(tmp_path, "huggingface", revision=COMMIT)


@pytest.mark.parametrize("name", HUBS)
def test_pin_says_the_commit_and_what_its_files_are(
    name: str, hub: Served, environment: dict[str, str], tmp_path: Path
) -> None:
    made = run_cli("pin", "owner/name", "--hub", name, "--out", "pin.json", env=environment, cwd=tmp_path)
    assert (made.returncode, made.stdout) == (0, f"{COMMIT}\n"), made.stderr
    stored = json.loads((tmp_path / "pin.json").read_text())
    assert (stored["hub"], stored["repository"], stored["revision"]) == (name, "owner/name", COMMIT)
    assert set(stored["files"]) == set(hub.files) - STRANGE
    weights = hub.files[FIRST]
    assert stored["files"][FIRST] == {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert len(hub.asked) == 1


@pytest.mark.parametrize("name", HUBS)
def test_pin_and_files_by_hand_need_no_network(
    name: str, hub: Served, caches: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_repository("owner/name", hub=name).save(tmp_path / "pin.json")
    to(NOWHERE, monkeypatch)
    hub.asked.clear()
    made = fetch_checkpoint(tmp_path / "checkpoint", pin=tmp_path / "pin.json", files=checkpoint)
    assert assert_whole(made, hub).settings["commit"] == COMMIT
    assert (made / FIRST).resolve() == checkpoint / FIRST
    assert hub.asked == []


@pytest.mark.parametrize("name", HUBS)
def test_files_by_hand_that_do_not_match_are_not_taken(
    name: str, hub: Served, caches: None, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hand = tmp_path / "hand"
    hand.mkdir()
    for file in (FIRST, "tokenizer.json", "config.json"):
        shutil.copyfile(checkpoint / file, hand / file)
    break_file(hand / FIRST)
    (hand / "config.json").write_text("{}")
    made = fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name, files=hand)
    assert_whole(made, hub)
    said = capsys.readouterr().err
    assert f"{hand / FIRST} is not taken: it has sha256" in said
    assert f"{hand / 'config.json'} is not taken: it has 2 bytes instead of" in said
    assert (made / "tokenizer.json").resolve() == hand / "tokenizer.json"
    assert hub.of("tokenizer.json") == []


def test_branch_that_moved_is_not_taken_for_the_pin(hub: Served, caches: None, tmp_path: Path) -> None:
    """ModelScope gives what a branch has now; a pin says that this is something else."""
    pin_repository("owner/name", hub="modelscope").save(tmp_path / "pin.json")
    hub.files["tokenizer.json"] += b" "
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of owner/name came as another file"):
        fetch_checkpoint(tmp_path / "checkpoint", pin=tmp_path / "pin.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "there is no pin"),
        ("[]", "is not a pin"),
        ("{", "is not a pin"),
        ({"files": {"../x.json": {"size": 1, "sha256": "0" * 64}}}, "is not a pin"),
        ({"files": {"config.json": {"size": 1}}}, "is not a pin"),
        ({"files": {"config.json": {"size": -1, "sha256": "0" * 64}}}, "is not a pin"),
        ({"files": {"config.json": {"size": 1, "sha256": "../../x"}}}, "is not a pin"),
        ({"hub": "elsewhere"}, "there is no hub 'elsewhere'; these are: huggingface, modelscope"),
        ({"branch": "../../x"}, "is not a revision"),
        ({"repository": "../x"}, "is not a"),
    ],
)
def test_what_is_no_pin_is_refused(
    change: str | dict | None, says: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    path = tmp_path / "pin.json"
    if isinstance(change, dict):
        pin_repository("owner/name").save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif change is not None:
        path.write_text(change)
    with pytest.raises(CheckpointError) as refused:
        fetch_checkpoint(tmp_path / "checkpoint", pin=path)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_files_by_hand_go_with_a_hub(checkpoint: Path, hub: Served, caches: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--files goes with"):
        fetch_checkpoint(tmp_path / "checkpoint", checkpoint, files=checkpoint)
    assert "there is no folder" in refusal(tmp_path, "huggingface", files=tmp_path / "nowhere")


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, as long apart as is asked; not where that is longer than a person should wait unknowing."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fail(**how: object) -> Callable[[], None]:
        def act() -> None:
            raise hubs.TransientError("x", **how)

        return act

    for how, wanted in (({}, [2, 8]), ({"wait": 5}, [5, 8]), ({"wait": 300}, []), ({"at_once": True}, [])):
        waited.clear()
        with pytest.raises(hubs.TransientError):
            hubs.persist(fail(**how))
        assert waited == wanted
