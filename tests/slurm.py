"""A SLURM cluster of one node on this machine: real daemons with a temporary configuration.

The node is a network namespace that reaches only the controller, like the nodes of a cluster without internet access.
It reads the same files. The memory of a job is limited to its request, checked every second.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hub_server import Served
from support import BIN, REPOSITORY

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "ip", "nsenter", "setpriv")
NETWORK = int(ipaddress.IPv4Address("10.213.0.0"))
"""First address of 16,384 networks of four addresses: each run has its own, beside others and what killed ones left."""
PATIENCE = 20.0
"""Seconds within which a daemon must respond."""
PROFILE = [
    *("--workflow-profile", REPOSITORY / "profiles" / "slurm"),
    # The default is longer than these stages run.
    *("--slurm-init-seconds-before-status-checks", "5"),
]
CONFIG = """\
ClusterName=hf2mnn
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=10
NodeName=node NodeHostname={host} NodeAddr={node} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why SLURM cannot be started on this machine; empty if it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"{', '.join(absent)} not found (Debian and Ubuntu: apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "network namespaces cannot be created (a container needs SYS_ADMIN and NET_ADMIN)"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _free_ports() -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for bound in sockets:
            bound.bind(("", 0))
        return [bound.getsockname()[1] for bound in sockets]


def _run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, env={**os.environ, "PATH": _path()})


def _delete_networks_of_killed_runs() -> None:
    names = subprocess.run(["ip", "netns", "list"], env={**os.environ, "PATH": _path()}, capture_output=True, text=True)
    for name, pid in re.findall(r"^(hf2mnn-(\d+))\b", names.stdout, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            _run("ip", "netns", "delete", name)


@contextmanager
def _network() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the host's address, the node's and the prefix of a command on the node, which has no other route."""
    _delete_networks_of_killed_runs()
    pid = os.getpid()
    name, host_device, node_device = f"hf2mnn-{pid}", f"hf{pid}a", f"hf{pid}b"
    host, node = (str(ipaddress.IPv4Address(NETWORK + pid % 2**14 * 4 + number)) for number in (1, 2))
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", host_device, "type", "veth", "peer", "name", node_device, "netns", name)
        _run("ip", "address", "add", f"{host}/30", "dev", host_device)
        _run("ip", "link", "set", host_device, "up")
        on_node = ["nsenter", f"--net=/run/netns/{name}"]  # not `ip netns exec`, which hides /sys/fs/cgroup
        _run(*on_node, "ip", "address", "add", f"{node}/30", "dev", node_device)
        for device in ("lo", node_device):
            _run(*on_node, "ip", "link", "set", device, "up")
        yield host, node, on_node
    finally:
        _run("ip", "netns", "delete", name)


@contextmanager
def _daemon(command: list[object], log: Path, **environment: str) -> Iterator[None]:
    """Run a daemon that ends with this process, even if it is killed."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
            stdout=output,
            stderr=output,
            env={**os.environ, "PATH": _path(), **environment},
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_output(command: list[str], expected: str, folder: Path, environment: dict[str, str]) -> None:
    end, output = time.monotonic() + PATIENCE, ""
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5)
            output = process.stdout + process.stderr
            if process.returncode == 0 and expected in process.stdout:
                return
        time.sleep(0.3)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"SLURM does not start: {output}\n{logs}")


@contextmanager
def one_node(folder: Path, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Start a cluster and yield the environment for its commands (sbatch, squeue, ...).

    Args:
        folder: Folder for configuration, state and logs.
        cpus: Number of CPUs of the node, whatever the machine has.

    Raises:
        RuntimeError: The daemons do not respond; the message has their logs.
    """
    Path("/etc/slurm").mkdir(exist_ok=True)
    for name in ("munge", "etc", "state", "spool"):
        (folder / name).mkdir(parents=True, mode=0o755)
    host = socket.gethostname().split(".")[0]
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    memory = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20) * 9 // 10
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    with ExitStack() as stack:
        address, node, on_node = stack.enter_context(_network())
        values = {"host": host, "address": address, "node": node, "folder": folder, "cpus": cpus, "memory": memory}
        (folder / "etc" / "slurm.conf").write_text(CONFIG.format(ports=_free_ports(), **values))
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *munge], folder / "munged.log"))
        conf = {"SLURM_CONF": environment["SLURM_CONF"]}
        _wait_for_output(["munge", "--socket", f"{folder}/munge/socket", "--no-input"], "MUNGE:", folder, environment)
        stack.enter_context(_daemon(["slurmctld", "-D", "-i"], folder / "slurmctld.log", **conf))
        # The plugin does not pass SLURM_CONF to srun, so the node has the file at its default path.
        slurmd = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            'mount --bind "$0" /etc/slurm && exec slurmd -D -N node',
            folder / "etc",
        ]
        stack.enter_context(_daemon([*on_node, *slurmd], folder / "slurmd.log", **conf))
        _wait_for_output(["sinfo", "--noheader", "--format=%T"], "idle", folder, environment)
        yield environment


@dataclass(frozen=True)
class Site:
    """A cluster and a hub.

    Attributes:
        environment: Environment of SLURM commands and of Snakemake, which names the hub.
        hub: The hub, which the node cannot reach.
    """

    environment: dict[str, str]
    hub: Served

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def queue(self, state: str = "all") -> list[str]:
        """Return the ids of the jobs in a state, by default of pending and running ones."""
        states = ["--states", state] if state != "all" else []
        return self.run("squeue", "--noheader", "--format=%i", *states).stdout.split()

    def start(
        self, *arguments: object, cwd: Path, profile: list[object] = PROFILE, **environment: str
    ) -> subprocess.Popen[str]:
        """Start Snakemake with the profile for SLURM."""
        # Tests in the background ignore SIGINT, and their children inherit that.
        command = [
            "env",
            "--default-signal=INT",
            BIN / "snakemake",
            "-s",
            REPOSITORY / "Snakefile",
            *profile,
            *arguments,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            [*map(str, command)], cwd=cwd, env=self.environment | environment, start_new_session=True, **pipes
        )

    def snakemake(self, *arguments: object, cwd: Path, **others: object) -> tuple[int, str]:
        """Return exit code and output."""
        process = self.start(*arguments, cwd=cwd, **others)
        output = process.communicate(timeout=900)[0]
        return process.returncode, output
