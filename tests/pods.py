"""A Kubernetes of one node, as far as Snakemake's plugin asks for one, and an S3 beside it.

The API server is a small one of ours that keeps secrets and jobs; the plugin and its client are the real ones. A pod is
processes of this machine with the image's programs, an empty folder to work in, and no environment but what the pod
names: of the folder from which the run was started they see nothing.
"""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import flask
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from support import BIN, REPOSITORY

BUCKET = "runs"
KEYS = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "someone", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "anything"}
IMAGE = {"PATH": f"{REPOSITORY / 'workflow'}:{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
"""Environment of the image."""
OWN = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
START = 'mount -t tmpfs none "$1" && mkdir "$1/workdir" && cd "$1/workdir" && shift && exec "$@"'
"""Of a pod: its first argument is the folder in whose place it has an empty one, the others are its command."""
JOBS, PODS, SECRETS = (
    "/apis/batch/v1/namespaces/default/jobs",
    "/api/v1/namespaces/default/pods",
    "/api/v1/namespaces/default/secrets",
)


def missing() -> str:
    """Why no pod can be started here; empty where one can."""
    done = subprocess.run([*OWN, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, text=True)
    return f"a pod needs file systems of its own, hence root: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class Pod:
    """A job and its one pod. `asked` is the container as Kubernetes was asked for it."""

    asked: dict[str, Any]
    process: subprocess.Popen[str]
    log: Path

    @property
    def status(self) -> dict[str, Any]:
        code = self.process.poll()
        return {"active": 1} if code is None else {"succeeded": int(code == 0), "failed": int(code != 0)}

    @property
    def state(self) -> dict[str, Any]:
        code = self.process.poll()
        return {"running": {}} if code is None else {"terminated": {"exitCode": code}}


@dataclass
class Cluster:
    """What runs and what has been asked for. Pods do not see the folder `hidden`; `pods` by the names of their jobs,
    those that are gone among them.
    """

    hidden: Path
    folder: Path
    s3: str
    pods: dict[str, Pod] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def wheels(self) -> Path:
        """What Snakemake installs in each pod, as the image has it."""
        return self.folder / "wheels"

    def start(self, name: str, container: dict[str, Any]) -> None:
        """Start a job's container."""
        environment = dict(IMAGE)
        for variable in container.get("env", []):
            key = variable["valueFrom"]["secretKeyRef"]
            environment[variable["name"]] = base64.b64decode(self.secrets[key["name"]][key["key"]]).decode()
        log = self.folder / f"{name}.log"
        words = self._pod(*container["command"], *container["args"])
        with log.open("w") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd="/")
        self.pods[name] = Pod(container, process, log)

    def _pod(self, *command: str) -> list[str]:
        return [*OWN, "sh", "-c", START, "pod", str(self.hidden), *command]

    def see(self, command: list[str]) -> str:
        """What a command says in a pod."""
        done = subprocess.run(self._pod(*command), env=IMAGE, capture_output=True, text=True, cwd="/")
        return done.stdout + done.stderr

    @property
    def bucket(self) -> Any:
        """As boto3 has it."""
        secrets = dict(zip(("aws_access_key_id", "aws_secret_access_key"), KEYS.values(), strict=True))
        return boto3.resource("s3", endpoint_url=self.s3, region_name="us-east-1", **secrets).Bucket(BUCKET)

    def environment(self) -> dict[str, str]:
        """For the machine from which runs are started."""
        return {"KUBECONFIG": str(self.folder / "kubeconfig"), **KEYS}


def _serve(cluster: Cluster) -> flask.Flask:
    app = flask.Flask(__name__)

    @app.post(SECRETS)
    def make_secret() -> dict:
        given = flask.request.get_json()
        cluster.secrets[given["metadata"]["name"]] = given["data"]
        return given

    @app.delete(f"{SECRETS}/<name>")
    def forget_secret(name: str) -> dict:
        del cluster.secrets[name]
        return {}

    @app.post(JOBS)
    def make_job() -> dict:
        given = flask.request.get_json()
        (container,) = given["spec"]["template"]["spec"]["containers"]
        cluster.start(given["metadata"]["name"], container)
        return given

    @app.get(f"{JOBS}/<name>/status")
    def job_status(name: str) -> dict:
        return {"metadata": {"name": name}, "status": cluster.pods[name].status}

    @app.delete(f"{JOBS}/<name>")
    def delete_job(name: str) -> dict:
        cluster.pods[name].process.kill()
        return {}

    @app.get(PODS)
    def list_pods() -> dict:
        name = flask.request.args["labelSelector"].removeprefix("job-name=")
        pod = cluster.pods[name]
        container = {"name": "snakemake", "image": pod.asked["image"], "imageID": "", "ready": True, "restartCount": 0}
        return {
            "items": [{"metadata": {"name": name}, "status": {"containerStatuses": [container | {"state": pod.state}]}}]
        }

    @app.get(f"{PODS}/<name>/log")
    def pod_log(name: str) -> flask.Response:
        return flask.Response(cluster.pods[name].log.read_text(), mimetype="text/plain")

    @app.delete(f"{PODS}/<name>")
    def delete_pod(name: str) -> dict:
        cluster.pods[name].process.kill()
        return {}

    return app


def _download_plugins(folder: Path) -> None:
    """As the image does."""
    pins = [
        line
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
        if line.startswith("snakemake-storage-plugin-")
    ]
    subprocess.run([BIN / "pip", "download", "--quiet", "--no-deps", "--dest", folder, *pins], check=True)


@contextmanager
def kubernetes(hidden: Path) -> Iterator[Cluster]:
    """A cluster with a bucket store, both on ports of their own; all pods end with it. They do not see the folder
    `hidden`, in which runs are started.
    """
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="pods-") as folder:
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        cluster = Cluster(hidden, Path(folder), "http://{}:{}".format(*store.get_host_and_port()))
        _download_plugins(cluster.wheels)
        cluster.bucket.create()
        server = make_server("127.0.0.1", 0, _serve(cluster), threaded=True)
        Thread(target=server.serve_forever, daemon=True).start()
        named = {"cluster": "here", "user": "me"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": named}],
            "current-context": "here",
        }
        (cluster.folder / "kubeconfig").write_text(json.dumps(config))
        try:
            yield cluster
        finally:
            server.shutdown()
            store.stop()
            for pod in cluster.pods.values():
                pod.process.kill()
                pod.process.wait()
