"""Local HTTP server with the APIs of both hubs and configurable failures.

Tests use the hubs' own clients with it, so they get the clients' real exceptions.
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
"""Block size in bytes of a slow transfer."""


@dataclass
class Served:
    """State and configuration of the server.

    Attributes:
        files: Files of owner/name.
        fail: Failure of all requests: "unknown", "gated", "login", "forbidden", "token", or a status.
        transfer: Failures of the next transfers of weights, one each: "cut" in the middle, "corrupted" in a byte,
            "truncated" with a matching length, "slow", "stalled" in the middle, "whole" (no ranges), or a status.
        retry_after: Value of the header Retry-After.
        redirect: Whether requests for weights are redirected to the other port.
        requests: Methods and paths of all requests.
        ranges: File names and values of the header Range.
        tokens: For each request of a file, whether it used the other port, and its header Authorization.
        half_sent: Set when a slow transfer has sent half of a file.
        endpoint: URL of the server.
        other_endpoint: URL of the other port.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fail: str = ""
    transfer: list[str] = field(default_factory=list)
    retry_after: str = ""
    redirect: bool = False
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: list[tuple[bool, str]] = field(default_factory=list)
    half_sent: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    other_endpoint: str = ""

    def of(self, name: str) -> list[str]:
        """Return the requests for a file's content."""
        return [path for path in self.requests if path.startswith("GET ") and path.endswith(f"/{name}")]


REFUSALS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "No such repository"}),
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

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        resolved = path.partition("/resolve/")[2].partition("/")[2]
        name = query.get("FilePath", [resolved or path.rpartition("/")[2]])[0]
        if path == "/api/agent-harnesses":  # an optional request of the client
            return self.reply(404)
        self.served.requests.append(f"{self.command} {path}" + (f"/{name}" if "FilePath" in query else ""))
        if self.served.fail:
            status, headers = REFUSALS.get(self.served.fail) or (int(self.served.fail), {})
            if self.served.retry_after:
                headers = headers | {"Retry-After": self.served.retry_after}
            return self.reply(status, **headers)
        revision = query.get("Revision", ["main"])[0]
        if path in (f"/api/models/owner/name/revision/{known}" for known in BRANCHES):
            return self.reply_json(self.info())
        if path == "/api/v1/models/owner/name/repo/files" and revision in BRANCHES:
            return self.reply_json({"Code": 200, "Data": {"Files": self.listing()}})
        if path == "/api/v1/models/owner/name/repo" and revision in BRANCHES and name in self.served.files:
            return self.send_file(name)
        if path.startswith(("/owner/name/resolve/", "/cdn/")) and name in self.served.files:
            return self.send_file(name)
        code = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
        return self.reply(404, X_Error_Code=code, X_Error_Message=code)

    def info(self) -> dict:
        siblings = []
        for name, stored in self.served.files.items():
            entry = {"rfilename": name, "size": len(stored), "blobId": blob_id(stored)}
            if is_lfs(name):
                # The blob id of an LFS file is that of its pointer.
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
        redirected = self.headers.get("Host") == urlsplit(self.served.other_endpoint).netloc
        self.served.tokens.append((redirected, self.headers.get("Authorization", "")))
        if self.served.redirect and is_lfs(name) and not redirected:
            return self.reply(302, Location=f"{self.served.other_endpoint}/cdn/{name}?signature=1")
        failure = self.served.transfer.pop(0) if is_lfs(name) and self.served.transfer else ""
        if failure.isdigit():
            return self.reply(
                int(failure), **({"Retry-After": self.served.retry_after} if self.served.retry_after else {})
            )
        requested, first = self.headers.get("Range", ""), 0
        if requested:
            self.served.ranges.append(f"{name} {requested}")
        if requested and failure != "whole":
            first = int(requested.removeprefix("bytes=").partition("-")[0])
        if failure == "corrupted":
            middle = len(stored) // 2
            stored = stored[:middle] + bytes([stored[middle] ^ 255]) + stored[middle + 1 :]
        if failure == "truncated":
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
        if failure == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif failure in ("slow", "stalled"):
            self.send_slowly(body, 0.5 if failure == "slow" else 600)
        else:
            self.wfile.write(body)
        return None

    def send_slowly(self, body: bytes, seconds: float) -> None:
        """Send the first half in blocks, and the rest `seconds` later."""
        half = len(body) // 2
        for start in range(0, half, STEP):
            self.wfile.write(body[start : min(start + STEP, half)])
        self.wfile.flush()
        self.served.half_sent.set()
        threading.Event().wait(seconds)
        try:
            self.wfile.write(body[half:])
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Served]:
    """Serve `files` as owner/name on two ports, the second for redirects, until the block ends."""
    served = Served(dict(files))
    servers = [Server(("127.0.0.1", 0), type("Bound", (Handler,), {"served": served})) for _ in range(2)]
    served.endpoint, served.other_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in servers)
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
