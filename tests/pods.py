"""A Kubernetes cluster of one node, as far as Snakemake's plugin needs one, and an S3 server.

The API server is a small Flask application with secrets and jobs; the plugin and its client are real. A pod is a
process of this machine with the programs of the image, an empty working directory, and only the environment that the
job names. It cannot read the folder from which the run was started.
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
"""Script of a pod: the first argument is the folder that an empty one replaces, the others are the command."""
JOBS, PODS, SECRETS = (
    "/apis/batch/v1/namespaces/default/jobs",
    "/api/v1/namespaces/default/pods",
    "/api/v1/namespaces/default/secrets",
)


def missing() -> str:
    """Return why pods cannot be started on this machine; empty if they can."""
    process = subprocess.run([*OWN, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, text=True)
    return f"mount namespaces need root: {process.stderr.strip()}" if process.returncode else ""


@dataclass
class Pod:
    """A job and its only pod.

    Attributes:
        container: Container of the request.
        process: Its process.
        log: File with its output.
    """

    container: dict[str, Any]
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
    """State of the cluster.

    Attributes:
        hidden: Folder that pods cannot read.
        folder: Folder for logs and wheels.
        s3: URL of the S3 server.
        pods: Pods by the names of their jobs, ended ones included.
        secrets: Secrets by name.
    """

    hidden: Path
    folder: Path
    s3: str
    pods: dict[str, Pod] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def wheels(self) -> Path:
        """Folder of the wheels that Snakemake installs in each pod; the image has one."""
        return self.folder / "wheels"

    def start(self, name: str, container: dict[str, Any]) -> None:
        """Start a job's container."""
        environment = dict(IMAGE)
        for variable in container.get("env", []):
            key = variable["valueFrom"]["secretKeyRef"]
            environment[variable["name"]] = base64.b64decode(self.secrets[key["name"]][key["key"]]).decode()
        log = self.folder / f"{name}.log"
        command = self._pod(*container["command"], *container["args"])
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd="/")
        self.pods[name] = Pod(container, process, log)

    def _pod(self, *command: str) -> list[str]:
        return [*OWN, "sh", "-c", START, "pod", str(self.hidden), *command]

    def run_in_pod(self, command: list[str]) -> str:
        """Return the output of a command in a pod."""
        process = subprocess.run(self._pod(*command), env=IMAGE, capture_output=True, text=True, cwd="/")
        return process.stdout + process.stderr

    @property
    def bucket(self) -> Any:
        """The bucket of the runs."""
        secrets = dict(zip(("aws_access_key_id", "aws_secret_access_key"), KEYS.values(), strict=True))
        return boto3.resource("s3", endpoint_url=self.s3, region_name="us-east-1", **secrets).Bucket(BUCKET)

    def environment(self) -> dict[str, str]:
        """Return the environment of the machine from which runs are started."""
        return {"KUBECONFIG": str(self.folder / "kubeconfig"), **KEYS}


def _serve(cluster: Cluster) -> flask.Flask:
    app = flask.Flask(__name__)

    @app.post(SECRETS)
    def create_secret() -> dict:
        request = flask.request.get_json()
        cluster.secrets[request["metadata"]["name"]] = request["data"]
        return request

    @app.delete(f"{SECRETS}/<name>")
    def delete_secret(name: str) -> dict:
        del cluster.secrets[name]
        return {}

    @app.post(JOBS)
    def create_job() -> dict:
        request = flask.request.get_json()
        (container,) = request["spec"]["template"]["spec"]["containers"]
        cluster.start(request["metadata"]["name"], container)
        return request

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
        container = {
            "name": "snakemake",
            "image": pod.container["image"],
            "imageID": "",
            "ready": True,
            "restartCount": 0,
        }
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
    """Download the storage plugins, as the image does."""
    pins = [
        line
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
        if line.startswith("snakemake-storage-plugin-")
    ]
    subprocess.run([BIN / "pip", "download", "--quiet", "--no-deps", "--dest", folder, *pins], check=True)


@contextmanager
def kubernetes(hidden: Path) -> Iterator[Cluster]:
    """Start a cluster and an S3 server on free ports; all pods end with the block.

    Args:
        hidden: Folder in which runs are started, which pods cannot read.
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
        context = {"cluster": "here", "user": "me"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": context}],
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
