"""A server on this machine that speaks as the hubs do, as well or as badly as a test asks.

The hubs' own clients talk to it, so what is tested is what a user gets: the errors of a client, not of a stand-in.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("main", "master", COMMIT)
STEP = 4096
"""Bytes that a slow transfer sends at a time."""


@dataclass
class Served:
    """What the server does.

    `files` are those of owner/name. `fail` says how all requests fail: "unknown", "gated", "login", "forbidden",
    "token", or a status. `transfer` says how the weights come, each way as often as it stands there, then well:
    "cut" in the middle, "corrupted" in a byte, "truncated" with the length of what came, "slow", "stalled" in the
    middle for good, "whole" (no ranges), or a status. `redirect` sends whoever asks for weights to another port.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fail: str = ""
    transfer: list[str] = field(default_factory=list)
    retry_after: str = ""
    redirect: bool = False
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: list[tuple[bool, str]] = field(default_factory=list)
    """For each request of a file: whether it came to the other port, and with which Authorization."""
    sent: threading.Event = field(default_factory=threading.Event)
    """Set when a slow transfer has sent half of a file."""
    endpoint: str = ""
    elsewhere: str = ""

    def of(self, name: str) -> list[str]:
        """Requests of a file's contents."""
        return [path for path in self.asked if path.startswith("GET ") and path.endswith(f"/{name}")]


REFUSALS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "login": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "Forbidden"}),
}


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def blob_id(stored: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, *_: object) -> None: ...

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def say_json(self, content: object) -> None:
        self.say(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        name = query.get("FilePath", [path.rpartition("/")[2]])[0]
        if path == "/api/agent-harnesses":  # by which the client names whom it works for
            return self.say(404)
        self.served.asked.append(f"{self.command} {path}" + (f"/{name}" if "FilePath" in query else ""))
        if self.served.fail:
            status, headers = REFUSALS.get(self.served.fail) or (int(self.served.fail), {})
            if self.served.retry_after:
                headers = headers | {"Retry-After": self.served.retry_after}
            return self.say(status, **headers)
        revision = query.get("Revision", ["main"])[0]
        if path in (f"/api/models/owner/name/revision/{known}" for known in BRANCHES):
            return self.say_json(self.info())
        if path == "/api/v1/models/owner/name/repo/files" and revision in BRANCHES:
            return self.say_json({"Code": 200, "Data": {"Files": self.listing()}})
        if path == "/api/v1/models/owner/name/repo" and revision in BRANCHES and name in self.served.files:
            return self.send_file(name)
        if path.startswith(("/owner/name/resolve/", "/cdn/")) and name in self.served.files:
            return self.send_file(name)
        code = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
        return self.say(404, X_Error_Code=code, X_Error_Message=code)

    def info(self) -> dict:
        siblings = []
        for name, stored in self.served.files.items():
            entry = {"rfilename": name, "size": len(stored), "blobId": blob_id(stored)}
            if is_lfs(name):
                # The blob that git has is the pointer.
                entry["lfs"] = {"size": len(stored), "sha256": hashlib.sha256(stored).hexdigest(), "pointerSize": 134}
                entry["blobId"] = "f" * 40
            siblings.append(entry)
        return {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def listing(self) -> list[dict]:
        entries = [{"Path": "figures", "Name": "figures", "Type": "tree", "Size": 0, "Revision": "e" * 40}]
        for number, (name, stored) in enumerate(sorted(self.served.files.items())):
            last = number == len(self.served.files) - 1
            entries.append(
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": len(stored),
                    "Sha256": hashlib.sha256(stored).hexdigest(),
                    "IsLFS": is_lfs(name),
                    "Revision": COMMIT if last else "d" * 40,
                    "CommittedDate": 1_700_000_000 + number,
                }
            )
        return entries

    def send_file(self, name: str) -> None:
        stored = self.served.files[name]
        there = self.headers.get("Host") == urlsplit(self.served.elsewhere).netloc
        self.served.tokens.append((there, self.headers.get("Authorization", "")))
        if self.served.redirect and is_lfs(name) and not there:
            return self.say(302, Location=f"{self.served.elsewhere}/cdn/{name}?signature=1")
        way = self.served.transfer.pop(0) if is_lfs(name) and self.served.transfer else ""
        if way.isdigit():
            return self.say(int(way), **({"Retry-After": self.served.retry_after} if self.served.retry_after else {}))
        asked, first = self.headers.get("Range", ""), 0
        if asked:
            self.served.ranges.append(f"{name} {asked}")
        if asked and way != "whole":
            first = int(asked.removeprefix("bytes=").partition("-")[0])
        if way == "corrupted":
            middle = len(stored) // 2
            stored = stored[:middle] + bytes([stored[middle] ^ 255]) + stored[middle + 1 :]
        if way == "truncated":
            stored = stored[: len(stored) // 2]
        body = stored[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(stored).hexdigest() if is_lfs(name) else blob_id(stored)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(stored) - 1}/{len(stored)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if way == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif way in ("slow", "stalled"):
            self.send_slowly(body, 0.5 if way == "slow" else 600)
        else:
            self.wfile.write(body)
        return None

    def send_slowly(self, body: bytes, seconds: float) -> None:
        """Half of it in steps, the rest `seconds` later."""
        half = len(body) // 2
        for start in range(0, half, STEP):
            self.wfile.write(body[start : min(start + STEP, half)])
        self.wfile.flush()
        self.served.sent.set()
        threading.Event().wait(seconds)
        try:
            self.wfile.write(body[half:])
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no error here."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Served]:
    """Serve `files` as owner/name on two ports, the second for redirects, until the block ends."""
    served = Served(dict(files))
    servers = [Server(("127.0.0.1", 0), type("Bound", (Handler,), {"served": served})) for _ in range(2)]
    served.endpoint, served.elsewhere = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield served
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
