"""The fetch stage, from folders and from hubs: a real HTTP server on this machine (`hub_server`)."""

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

from hf2mnn.checkpoint.folder import TEMPLATES
from hf2mnn.checkpoint.hub import download
from hf2mnn.checkpoint.hub.base import TransientError, retry
from hf2mnn.checkpoint.hub.download import pin_repository
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.manifest import MARKER, Manifest
from hf2mnn.core.progress import Progress
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hub_server import COMMIT, Served
from support import BIN, SHAPES_VL, run_cli
from synth import Shape, make_checkpoint_like

UNUSED = {"modeling_x.py", "pytorch_model.bin", "README.md"}
FIRST = "model-00001-of-00002.safetensors"
HUBS = ["huggingface", "modelscope"]
OFFLINE = "http://127.0.0.1:9"
"""A port on which nothing listens."""


@pytest.fixture
def environment(hub: Served, tmp_path: Path) -> dict[str, str]:
    """Variables that direct the clients to the server and to caches of this test."""
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
    """The same in this process, with clients that do not wait."""
    import modelscope_hub._download_control
    from huggingface_hub import constants, hf_api

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_endpoint(hub.endpoint, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{environment['HF_HOME']}/hub")
    # The client writes in blocks of 10 MB; these files are smaller.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{environment['HF_HOME']}/token")
    monkeypatch.setattr(hf_api.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(modelscope_hub._download_control._DownloadControl, "sleep", lambda *_: None)


def set_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct the clients of both hubs to `endpoint`."""
    from huggingface_hub import constants, file_download, hf_api

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetch_error(tmp_path: Path, hub: str, **arguments: object) -> str:
    """Return the one-line error of the stage for owner/name, which leaves no output."""
    with pytest.raises(CheckpointError) as error:
        fetch_checkpoint(tmp_path / "results" / "source", repository="owner/name", hub=hub, **arguments)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "results" / "source").exists()
    return str(error.value)


def assert_complete(folder: Path, served: Served) -> Manifest:
    """Check that exactly the files that stages read are there, as the server has them."""
    manifest = Manifest.load(folder)
    manifest.verify()
    assert set(manifest.outputs) == set(served.files) - UNUSED
    for name in manifest.outputs:
        assert (folder / name).read_bytes() == served.files[name]
    return manifest


def test_output_is_links_to_the_originals(checkpoint: Path, tmp_path: Path) -> None:
    """A 4 GB checkpoint is not copied, and the manifest detects changes of it."""
    folder = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    manifest = Manifest.load(folder)
    names = {path.name for path in checkpoint.iterdir()} - UNUSED
    assert set(manifest.outputs) == names == {path.name for path in folder.iterdir()} - {"manifest.json", ".hf2mnn"}
    for name in names:
        assert (folder / name).is_symlink()
        assert (folder / name).samefile(checkpoint / name)
        assert manifest.outputs[name]["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert (manifest.settings, manifest.paths) == ({}, {"path": str(checkpoint)})
    manifest.verify()


def test_code_and_pickles_are_not_linked(checkpoint: Path, tmp_path: Path) -> None:
    """No file of a repository that could run as code reaches a stage."""
    (checkpoint / "config.py").touch()
    (checkpoint / "model.safetensors.py").touch()
    folder = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    suffixes = {path.suffix for path in folder.iterdir() if path.name != ".hf2mnn"}
    assert suffixes == {".jinja", ".json", ".safetensors"}


def test_relative_folder_is_linked_absolutely(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetch_checkpoint(Path("results/source"), Path("original"))
    monkeypatch.chdir("/")
    Manifest.load(tmp_path / "results" / "source").verify()


@pytest.mark.parametrize("old", [False, True], ids=["new", "existing"])
def test_failed_fetch_leaves_the_output_unchanged(old: bool, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "source"
    if old:
        fetch_checkpoint(target, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        fetch_checkpoint(target, checkpoint)
    assert target.exists() == old
    assert not old or (target / "config.json").exists()


def test_checkpoint_is_not_its_own_output(checkpoint: Path) -> None:
    """`--path X --out X` would delete the only copy of the weights."""
    for name in UNUSED:
        (checkpoint / name).unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointError):
        fetch_checkpoint(checkpoint, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [{}, {"path": Path("x"), "repository": "a/b"}, {"pin": Path("x"), "repository": "a/b"}],
    ids=["none", "path and repository", "pin and repository"],
)
def test_exactly_one_source_is_required(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give exactly one of --path"):
        fetch_checkpoint(tmp_path / "checkpoint", **arguments)


@pytest.mark.parametrize(
    "name", ["qwen", "a/b/c", "https://hub/a/b", "a/b c", "", "../x", "a/..", "-a/b", "a/b.git", "a/" + "b" * 200]
)
def test_malformed_repository_is_refused(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        fetch_checkpoint(tmp_path / "checkpoint", repository=name)
    assert len(str(error.value).splitlines()) == 1
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["../../x", "/etc", "-x", "a b"])
def test_malformed_revision_is_refused(revision: str, hub: Served, caches: None, tmp_path: Path) -> None:
    """Revisions become paths in a cache."""
    with pytest.raises(CheckpointError, match="is not a revision"):
        fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", revision=revision)
    assert hub.requests == []


# Hubs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUBS)
def test_adapter_from_a_hub(
    name: str, checkpoint: Path, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its two files are downloaded; the manifest records the commit."""
    module = "base_model.model.model.layers.0.mlp.up_proj"
    lora = {f"{module}.lora_A.weight": np.ones((2, 128)), f"{module}.lora_B.weight": np.ones((256, 2))}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "owner/other"}
    hub.files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save({key: value.astype(np.float32) for key, value in lora.items()}),
        "adapter_model.bin": b"\x80\x04.",
        "tokenizer.json": b"{}",
    }
    adapter = {"adapter_repository": "owner/name", "adapter_hub": name}
    manifest = Manifest.load(fetch_checkpoint(tmp_path / "checkpoint", checkpoint, **adapter))
    manifest.verify()
    assert manifest.settings["adapter"] == {
        "hub": name,
        "repository": "owner/name",
        "revision": "main" if name == "huggingface" else "master",
        "commit": COMMIT,
    }
    assert set(manifest.provenance["adapter"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("tokenizer" in request or ".bin" in request for request in hub.requests)
    if name == "huggingface":  # whose cache records the commits of branches
        set_endpoint(OFFLINE, monkeypatch)
        again = Manifest.load(fetch_checkpoint(tmp_path / "again", checkpoint, **adapter))
        assert again.digest() == manifest.digest()


@pytest.mark.parametrize("name", HUBS)
def test_chat_templates_in_a_subfolder(
    name: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are downloaded from the one subfolder that transformers reads, and again taken from the cache."""
    hub.files[f"{TEMPLATES}/tool_use.jinja"] = b"tools"
    manifest = assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert f"{TEMPLATES}/tool_use.jinja" in manifest.outputs
    hub.requests.clear()
    if name == "huggingface":  # whose cache records the commits of branches
        set_endpoint(OFFLINE, monkeypatch)
    assert_complete(fetch_checkpoint(tmp_path / "again", repository="owner/name", hub=name), hub)
    assert hub.of(f"{TEMPLATES}/tool_use.jinja") == []


@pytest.mark.parametrize("name", HUBS)
def test_fetch_from_a_hub(name: str, hub: Served, caches: None, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Only the files that stages read are requested, and no progress bar of a client is in the log."""
    manifest = assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    branch = {"huggingface": "main", "modelscope": "master"}[name]
    assert manifest.settings == {"hub": name, "repository": "owner/name", "revision": branch, "commit": COMMIT}
    assert not [path for path in hub.requests if path.rpartition("/")[2] in UNUSED]
    log = capfd.readouterr().err
    assert "\r" not in log
    assert "it/s" not in log


@pytest.mark.parametrize("name", HUBS)
def test_nothing_is_downloaded_twice(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    fetch_checkpoint(tmp_path / "one", repository="owner/name", hub=name)
    hub.requests.clear()
    assert_complete(fetch_checkpoint(tmp_path / "two", repository="owner/name", hub=name), hub)
    assert len(hub.requests) == 1


def test_client_finds_our_downloads(hub: Served, caches: None, tmp_path: Path) -> None:
    """The cache has the client's layout: its own functions find every file by branch and by commit."""
    from huggingface_hub import snapshot_download

    fetch_checkpoint(tmp_path / "one", repository="owner/name")
    cache = os.environ["HF_HOME"] + "/hub"
    for revision in ("main", COMMIT):
        folder = Path(snapshot_download("owner/name", revision=revision, cache_dir=cache, local_files_only=True))
        assert {path.name for path in folder.iterdir()} == set(hub.files) - UNUSED


def test_downloads_of_the_client_are_used(hub: Served, caches: None, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("owner/name", "tokenizer.json", cache_dir=os.environ["HF_HOME"] + "/hub", endpoint=hub.endpoint)
    hub.requests.clear()
    assert_complete(fetch_checkpoint(tmp_path / "one", repository="owner/name"), hub)
    assert hub.of("tokenizer.json") == []


@pytest.mark.parametrize(
    ("fail", "parts"),
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
def test_error_of_a_hub_is_one_line_with_advice(
    name: str, fail: str, parts: list[str], hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.fail = fail
    message = fetch_error(tmp_path, name)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", HUBS)
def test_error_has_the_wait_that_the_hub_requests(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.fail, hub.retry_after = "429", "300"
    assert "wait 300 s" in fetch_error(tmp_path, name)


@pytest.mark.parametrize("name", HUBS)
def test_missing_revision_is_named(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    assert "revision 'v9'" in fetch_error(tmp_path, name, revision="v9")


@pytest.mark.parametrize("name", HUBS)
def test_error_without_a_network_has_all_advice(
    name: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_endpoint(OFFLINE, monkeypatch)
    message = fetch_error(tmp_path, name)
    for part in (OFFLINE, "cannot be reached", "_ENDPOINT", "--files", "run the same command again"):
        assert part in message


def test_repository_without_weights_is_refused(hub: Served, caches: None, tmp_path: Path) -> None:
    """The error of the check names the repository, not the folder of links."""
    hub.files = {name: stored for name, stored in hub.files.items() if "safetensors" not in name}
    assert fetch_error(tmp_path, "huggingface").startswith("owner/name has no *.safetensors")


# Transfers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["slow", "cut", "corrupted", "truncated", "500", "503", "429"])
@pytest.mark.parametrize("name", HUBS)
def test_single_failure_of_a_transfer_is_recovered(
    name: str, way: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.transfer = [way]
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert hub.transfer == []


@pytest.mark.parametrize("name", HUBS)
def test_interrupted_transfer_is_resumed(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = ["cut"]
    fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name)
    (request,) = hub.ranges
    assert request.startswith(f"{FIRST} bytes=")
    assert 0 < int(request.partition("=")[2].rstrip("-")) <= len(hub.files[FIRST]) // 2


@pytest.mark.parametrize("ways", [[], ["cut"], ["cut", "whole"], ["503"]], ids=" ".join)
@pytest.mark.parametrize("name", HUBS)
def test_progress_counts_every_byte_once(
    name: str, ways: list[str], hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a transfer is resumed or starts again."""
    counted: dict[str, int] = {}

    @contextmanager
    def count(label: str, total: int, unit: str) -> Iterator[Progress]:
        assert (total, unit) == (len(hub.files[label.removeprefix("downloading ")]), "B")
        yield Counter(counted, label.removeprefix("downloading "))

    monkeypatch.setattr(download, "progress", count)
    hub.transfer = ways
    fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name)
    assert counted == {file: len(stored) for file, stored in hub.files.items() if file not in UNUSED}


class Counter:
    """Progress that adds up in `counted`."""

    def __init__(self, counted: dict[str, int], name: str) -> None:
        self.counted, self.name = counted, name

    def update(self, n: int = 1) -> None:
        self.counted[self.name] = self.counted.get(self.name, 0) + n


@pytest.mark.parametrize("name", HUBS)
def test_server_without_ranges_sends_the_file_again(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = ["cut", "whole"]
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("name", HUBS)
def test_corrupted_file_is_refused_and_removed(name: str, hub: Served, caches: None, tmp_path: Path) -> None:
    hub.transfer = ["corrupted"] * 100
    message = fetch_error(tmp_path, name)
    assert FIRST in message
    assert hashlib.sha256(hub.files[FIRST]).hexdigest()[:16] in message
    assert "--files" in message
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(FIRST) and "original" not in str(path)]
    hub.transfer = []
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)


@pytest.mark.parametrize("way", ["cut", "truncated", "503"])
@pytest.mark.parametrize("name", HUBS)
def test_repeated_failure_of_a_transfer_is_one_line(
    name: str, way: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    hub.transfer = [way] * 1000
    message = fetch_error(tmp_path, name)
    assert FIRST in message
    hub.transfer = []
    hub.requests.clear()
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name), hub)
    assert hub.of("tokenizer.json") == []


def test_token_is_not_sent_to_the_host_of_a_redirect(
    hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are on another host; an interrupted transfer is resumed there."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect, hub.transfer = True, ["cut"]
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name"), hub)
    assert {token for redirected, token in hub.tokens if redirected} == {""}
    assert {token for redirected, token in hub.tokens if not redirected} == {"Bearer hf_secret"}
    assert len(hub.ranges) >= 1


def test_redirect_of_modelscope(hub: Served, caches: None, tmp_path: Path) -> None:
    hub.redirect = True
    assert_complete(fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub="modelscope"), hub)
    assert sum(redirected for redirected, _ in hub.tokens) == 2


@pytest.mark.parametrize("name", ["huggingface", pytest.param("modelscope", marks=pytest.mark.slow)])
def test_killed_download_is_resumed(
    name: str, hub: Served, environment: dict[str, str], small_shape: Shape, tmp_path: Path
) -> None:
    """After kill -9 during the weights, the same command requests only the rest.

    The weights have 26 MB, because the client of Hugging Face writes blocks of 10 MB.
    """
    shape = replace(small_shape, text=small_shape.text | {"vocab_size": 98304})
    folder = make_checkpoint_like(shape, tmp_path / "large", shards=1, tokenizer=SHAPES_VL)
    hub.files = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", MARKER)
    }
    hub.transfer = ["stalled"]
    command = [BIN / "hf2mnn", "fetch", "--repository", "owner/name", "--hub", name, "--out", "checkpoint"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, stderr=subprocess.DEVNULL) as running:
        assert hub.half_sent.wait(60)
        wait_for_part(tmp_path)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "checkpoint").exists()
    hub.requests.clear()
    again = run_cli(*command[1:], env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_complete(tmp_path / "checkpoint", hub)
    weights = "model-00001-of-00001.safetensors"
    (request,) = hub.ranges
    assert request.startswith(f"{weights} bytes=")
    assert 0 < int(request.partition("=")[2].rstrip("-")) < len(hub.files[weights])
    assert hub.of("tokenizer.json") == []


def wait_for_part(folder: Path) -> None:
    """Wait until the first bytes of an incomplete file are on disk."""
    for _ in range(1000):
        if any(path.stat().st_size for path in folder.rglob("*.incomplete")):
            return
        time.sleep(0.01)
    raise AssertionError("nothing was written")


def test_concurrent_processes_download_a_file_once(hub: Served, environment: dict[str, str], tmp_path: Path) -> None:
    """The second process waits for the download of the first."""
    program = """
from hf2mnn.checkpoint.hub.download import gather, get_hub, pin_repository
print(len(gather(get_hub("huggingface"), pin_repository("owner/name"))))
"""
    hub.transfer = ["slow", "slow"]
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    counts = [int(process.communicate(timeout=100)[0]) for process in processes]
    assert counts == [len(hub.files) - len(UNUSED)] * 2
    assert len(hub.of(FIRST)) == 1


def test_full_disk_is_detected_before_the_download(
    hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    message = fetch_error(tmp_path, "huggingface")
    assert "GB free" in message
    assert not [request for request in hub.requests if request.endswith(".safetensors")]


@pytest.mark.parametrize("name", HUBS)
def test_full_disk_during_the_download_is_reported(
    name: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf2mnn.checkpoint.hub.huggingface.http_get", full)
    monkeypatch.setattr("modelscope_hub._download._finish_download", full)
    message = fetch_error(tmp_path, name)
    assert "cannot be written" in message
    assert "No space left on device" in message
    assert "free some space" in message


# Caches, pins and user-provided files -------------------------------------------------------------------------------


def corrupt(path: Path) -> None:
    path = path.resolve()
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 255
    path.chmod(0o644)
    path.write_bytes(stored)


@pytest.mark.parametrize("name", HUBS)
def test_corrupted_file_in_the_cache_is_downloaded_again(
    name: str, hub: Served, caches: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    corrupt(fetch_checkpoint(tmp_path / "one", repository="owner/name", hub=name) / FIRST)
    hub.requests.clear()
    assert_complete(fetch_checkpoint(tmp_path / "two", repository="owner/name", hub=name), hub)
    assert len(hub.of(FIRST)) == 1
    assert "from the cache: sha256" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["main", COMMIT], ids=["branch", "commit"])
@pytest.mark.parametrize("fail", ["", "503"], ids=["no network", "hub down"])
def test_complete_cache_replaces_the_hub(
    revision: str, fail: str, hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_checkpoint(tmp_path / "one", repository="owner/name")
    hub.fail = fail
    if not fail:
        set_endpoint(OFFLINE, monkeypatch)
    manifest = assert_complete(fetch_checkpoint(tmp_path / "two", repository="owner/name", revision=revision), hub)
    assert manifest.settings["commit"] == COMMIT


def test_incomplete_cache_does_not(hub: Served, caches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_checkpoint(tmp_path / "one", repository="owner/name")
    (folder / FIRST).resolve().unlink()
    set_endpoint(OFFLINE, monkeypatch)
    assert "cannot be reached" in fetch_error(tmp_path, "huggingface", revision=COMMIT)


@pytest.mark.parametrize("name", HUBS)
def test_pin_command_prints_the_commit_and_writes_digests(
    name: str, hub: Served, environment: dict[str, str], tmp_path: Path
) -> None:
    process = run_cli("pin", "owner/name", "--hub", name, "--out", "pin.json", env=environment, cwd=tmp_path)
    assert (process.returncode, process.stdout) == (0, f"{COMMIT}\n"), process.stderr
    stored = json.loads((tmp_path / "pin.json").read_text())
    assert (stored["hub"], stored["repository"], stored["revision"]) == (name, "owner/name", COMMIT)
    assert set(stored["files"]) == set(hub.files) - UNUSED
    weights = hub.files[FIRST]
    assert stored["files"][FIRST] == {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert not [request for request in hub.requests if request.endswith(".safetensors")]


@pytest.mark.parametrize("name", HUBS)
def test_pin_with_user_provided_files_needs_no_network(
    name: str, hub: Served, caches: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_repository("owner/name", hub=name).save(tmp_path / "pin.json")
    set_endpoint(OFFLINE, monkeypatch)
    hub.requests.clear()
    folder = fetch_checkpoint(tmp_path / "checkpoint", pin=tmp_path / "pin.json", files=checkpoint)
    assert assert_complete(folder, hub).settings["commit"] == COMMIT
    assert (folder / FIRST).resolve() == checkpoint / FIRST
    assert hub.requests == []


@pytest.mark.parametrize("name", HUBS)
def test_user_provided_files_that_do_not_match_are_ignored(
    name: str, hub: Served, caches: None, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    provided = tmp_path / "provided"
    provided.mkdir()
    for file in (FIRST, "tokenizer.json", "config.json"):
        shutil.copyfile(checkpoint / file, provided / file)
    corrupt(provided / FIRST)
    (provided / "config.json").write_text("{}")
    folder = fetch_checkpoint(tmp_path / "checkpoint", repository="owner/name", hub=name, files=provided)
    assert_complete(folder, hub)
    log = capsys.readouterr().err
    assert f"ignoring {provided / FIRST}: sha256" in log
    assert f"ignoring {provided / 'config.json'}: 2 bytes instead of" in log
    assert (folder / "tokenizer.json").resolve() == provided / "tokenizer.json"
    assert hub.of("tokenizer.json") == []


def test_moved_branch_does_not_match_the_pin(hub: Served, caches: None, tmp_path: Path) -> None:
    """ModelScope serves the current files of a branch."""
    pin_repository("owner/name", hub="modelscope").save(tmp_path / "pin.json")
    hub.files["tokenizer.json"] += b" "
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of owner/name is corrupted"):
        fetch_checkpoint(tmp_path / "checkpoint", pin=tmp_path / "pin.json")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (None, "no pin "),
        ("[]", "is not a pin"),
        ("{", "is not a pin"),
        ({"files": {"../x.json": {"size": 1, "sha256": "0" * 64}}}, "is not a pin"),
        ({"files": {"config.json": {"size": 1}}}, "is not a pin"),
        ({"files": {"config.json": {"size": -1, "sha256": "0" * 64}}}, "is not a pin"),
        ({"files": {"config.json": {"size": 1, "sha256": "../../x"}}}, "is not a pin"),
        ({"hub": "elsewhere"}, "unknown hub 'elsewhere'; choose one of: huggingface, modelscope"),
        ({"branch": "../../x"}, "is not a revision"),
        ({"repository": "../x"}, "is not a"),
    ],
)
def test_invalid_pin_is_refused(
    change: str | dict | None, part: str, hub: Served, caches: None, tmp_path: Path
) -> None:
    path = tmp_path / "pin.json"
    if isinstance(change, dict):
        pin_repository("owner/name").save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif change is not None:
        path.write_text(change)
    with pytest.raises(CheckpointError) as error:
        fetch_checkpoint(tmp_path / "checkpoint", pin=path)
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_user_provided_files_require_a_hub(checkpoint: Path, hub: Served, caches: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--files is only for a repository or a pin"):
        fetch_checkpoint(tmp_path / "checkpoint", checkpoint, files=checkpoint)
    assert "no folder" in fetch_error(tmp_path, "huggingface", files=tmp_path / "nowhere")


def test_transient_errors_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three attempts with the requested waits; none for a wait above `MAX_WAIT`."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def fail(**options: object) -> Callable[[], None]:
        def act() -> None:
            raise TransientError("x", **options)

        return act

    for options, expected in (
        ({}, [2, 8]),
        ({"wait": 5}, [5, 8]),
        ({"wait": 300}, []),
        ({"report_now": True}, []),
    ):
        waits.clear()
        with pytest.raises(TransientError):
            retry(fail(**options))
        assert waits == expected
