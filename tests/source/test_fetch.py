"""The `source` stage: from a folder, and from a hub that is a real HTTP server on this machine.

The hub's own client talks to that server, so what is tested is what a user gets: the errors of the client, not of a
stand-in for it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hf2mnn.errors import SourceError
from hf2mnn.manifest import Manifest
from hf2mnn.source.fetch import fetch_source
from support import run_cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STRANGE = {"modeling_x.py", "pytorch_model.bin", "README.md"}


def test_links_lead_to_the_originals(checkpoint: Path, tmp_path: Path) -> None:
    """A 4 GB checkpoint is not copied, and a change of it is found by the manifest."""
    folder = fetch_source(tmp_path / "source", checkpoint)
    manifest = Manifest.load(folder)
    wanted = {path.name for path in checkpoint.iterdir()} - STRANGE
    assert set(manifest.outputs) == wanted == {path.name for path in folder.iterdir()} - {"manifest.json", ".hf2mnn"}
    for name in wanted:
        assert (folder / name).is_symlink()
        assert (folder / name).samefile(checkpoint / name)
        assert manifest.outputs[name]["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert manifest.settings == {"path": str(checkpoint)}
    manifest.verify()


def test_code_and_pickles_never_arrive(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a stranger's repository holds: nothing that could run is where a stage looks."""
    (checkpoint / "config.py").touch()
    (checkpoint / "model.safetensors.py").touch()
    folder = fetch_source(tmp_path / "source", checkpoint)
    arrived = {path.suffix for path in folder.iterdir() if path.name != ".hf2mnn"}
    assert arrived == {".json", ".safetensors"}


def test_relative_folder_is_linked_for_good(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fetch_source(Path("results/source"), Path("checkpoint"))
    monkeypatch.chdir("/")
    Manifest.load(tmp_path / "results" / "source").verify()


@pytest.mark.parametrize("old", [False, True], ids=["first time", "over an old one"])
def test_failed_fetch_leaves_what_was_there(old: bool, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "source"
    if old:
        fetch_source(target, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        fetch_source(target, checkpoint)
    assert target.exists() == old
    assert not old or (target / "config.json").exists()


def test_checkpoint_is_not_replaced_by_links_to_itself(checkpoint: Path) -> None:
    """`--path X --out X` would delete the only copy of the weights."""
    for name in STRANGE:
        (checkpoint / name).unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(SourceError):
        fetch_source(checkpoint, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize("given", [{}, {"path": Path("x"), "repository": "a/b"}], ids=["neither", "both"])
def test_one_source_is_wanted(given: dict, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="either a local folder or a hub repository"):
        fetch_source(tmp_path / "source", **given)


@pytest.mark.parametrize(
    "name", ["qwen", "a/b/c", "https://hub/a/b", "a/b c", "", "../x", "a/..", "-a/b", "a/b.git", "a/" + "b" * 200]
)
def test_what_is_no_repository_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        fetch_source(tmp_path / "source", repository=name)
    assert len(str(refused.value).splitlines()) == 1


@dataclass
class Hub:
    """What the server does: `files` of the repository owner/name, and how it fails where `fail` says so."""

    files: dict[str, bytes] = field(default_factory=dict)
    fail: str = ""
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


class Handler(BaseHTTPRequestHandler):
    """The endpoints of the hub that `snapshot_download` needs."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.hub.fail == "unknown":
            return self.say(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if self.hub.fail == "gated":
            return self.say(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if self.hub.fail == "login":
            return self.say(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        if self.hub.fail == "broken":
            return self.say(500)
        if path in (f"/api/models/owner/name/revision/{ref}" for ref in ("main", COMMIT)):
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self.say(200, json.dumps(info).encode(), Content_Type="application/json")
        if path == f"/api/models/owner/name/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(stored), "oid": hashlib.sha1(stored).hexdigest()}
                for name, stored in self.hub.files.items()
            ]
            return self.say(200, json.dumps(entries).encode(), Content_Type="application/json")
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        if name not in self.hub.files:
            code = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
            return self.say(404, X_Error_Code=code, X_Error_Message=code)
        stored = self.hub.files[name]
        etag = hashlib.sha256(stored).hexdigest()
        if self.hub.fail == "cut" and self.command == "GET" and name.endswith(".safetensors"):
            self.send_response(200)
            for header, value in {"Content-Length": len(stored), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(header, str(value))
            self.end_headers()
            self.wfile.write(stored[: len(stored) // 2])
            self.close_connection = True
            return None
        return self.say(200, stored, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    served = Hub({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": served}))
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., tuple[int, str, Path]]:
    """`hf2mnn source --repository owner/name` in a child: exit code, standard error, the folder asked for."""

    def run(endpoint: str, revision: str = "main") -> tuple[int, str, Path]:
        out = tmp_path / "results" / "source"
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        made = run_cli(
            "source", "--repository", "owner/name", "--revision", revision, "--out", out, env=environment, cwd=tmp_path
        )
        return made.returncode, made.stderr, out

    return run


def assert_refused(outcome: tuple[int, str, Path], says: str, gone: bool = True) -> None:
    """Exit code 1, one line of ours that says it, no traceback, and no folder."""
    code, said, out = outcome
    ours = [line for line in said.splitlines() if line.startswith("hf2mnn: ")]
    assert (code, len(ours), "Traceback" in said) == (1, 1, False), said[-500:]
    assert says in ours[0]
    assert not (gone and out.exists())


def test_snapshot_from_the_hub(hub: Hub, fetch: Callable[..., tuple[int, str, Path]]) -> None:
    """Only the files that stages read are asked for, and once here the hub is not needed again."""
    code, said, out = fetch(hub.endpoint)
    assert (code, "Traceback" in said) == (0, False), said
    manifest = Manifest.load(out)
    manifest.verify()
    assert set(manifest.outputs) == set(hub.files) - STRANGE
    for name in manifest.outputs:
        assert (out / name).read_bytes() == hub.files[name]
    assert manifest.settings == {"repository": "owner/name", "revision": "main", "commit": COMMIT}
    assert not [path for path in hub.asked if any(path.endswith(name) for name in STRANGE)]
    code, said, out = fetch("http://127.0.0.1:9")
    assert code == 0, said


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        ("unknown", "no repository owner/name"),
        ("gated", "gated"),
        ("login", "not logged in"),
        ("broken", "could not be downloaded"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    fail: str, says: str, hub: Hub, fetch: Callable[..., tuple[int, str, Path]]
) -> None:
    hub.fail = fail
    assert_refused(fetch(hub.endpoint), says)


def test_revision_that_is_not_there(hub: Hub, fetch: Callable[..., tuple[int, str, Path]]) -> None:
    assert_refused(fetch(hub.endpoint, "v9"), "no revision 'v9'")


def test_no_hub_at_all(fetch: Callable[..., tuple[int, str, Path]]) -> None:
    """Without a network: one sentence that says what to do, as on a train."""
    assert_refused(fetch("http://127.0.0.1:9"), "could not be downloaded")


def test_repository_without_weights(hub: Hub, fetch: Callable[..., tuple[int, str, Path]]) -> None:
    """Downloaded well, and still no checkpoint: the sentence of the check, not of the download."""
    hub.files = {name: stored for name, stored in hub.files.items() if "safetensors" not in name}
    assert_refused(fetch(hub.endpoint), "has no *.safetensors")


def test_interrupted_download_is_resumed(hub: Hub, fetch: Callable[..., tuple[int, str, Path]]) -> None:
    """A line that is cut in the middle of the weights: a sentence; and what came whole is not asked for again."""
    hub.fail = "cut"
    refused = fetch(hub.endpoint)
    hub.fail = ""
    hub.asked.clear()
    code, said, out = fetch(hub.endpoint)
    assert code == 0, said
    Manifest.load(out).verify()
    assert not [path for path in hub.asked if path.endswith("/tokenizer.json")]
    assert_refused(refused, "could not be downloaded", gone=False)
