"""A SLURM of one node on this machine: its real daemons, configured in a folder of their own and gone afterwards.

The node is a network namespace that reaches the controller and nothing else, as on a cluster whose nodes have no way
out; it sees the same files. Memory is held to what a job asked for, checked every second.
"""

from __future__ import annotations

import os
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

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "ip", "nsenter")
HOST, NODE = "10.213.77.1", "10.213.77.2"
PATIENCE = 20.0
"""Seconds within which a daemon answers."""
PROFILE = [
    *("--workflow-profile", REPOSITORY / "profiles" / "slurm"),
    # A site asks less often; its stages take longer.
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
    """Why no SLURM can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"{', '.join(absent)} not found (Debian and Ubuntu: apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "a node with a network of its own needs root"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "no network namespace can be made here (a container needs SYS_ADMIN and NET_ADMIN)"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _free_ports() -> list[int]:
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in bound:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in bound]


def _run(*words: object) -> None:
    subprocess.run([*map(str, words)], check=True, capture_output=True, env={**os.environ, "PATH": _path()})


@contextmanager
def _network() -> Iterator[list[str]]:
    """First words of a command on the node: a cable leads from it to this machine, and no route any further."""
    name = f"hf2mnn-{os.getpid()}"
    ours, theirs = f"hf{os.getpid()}a", f"hf{os.getpid()}b"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _run("ip", "address", "add", f"{HOST}/30", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        on_node = ["nsenter", f"--net=/run/netns/{name}"]  # not `ip netns exec`, which hides /sys/fs/cgroup
        _run(*on_node, "ip", "address", "add", f"{NODE}/30", "dev", theirs)
        for device in ("lo", theirs):
            _run(*on_node, "ip", "link", "set", device, "up")
        yield on_node
    finally:
        _run("ip", "netns", "delete", name)


@contextmanager
def _daemon(words: list[object], log: Path, **environment: str) -> Iterator[None]:
    with log.open("ab") as said:
        process = subprocess.Popen(
            [*map(str, words)], stdout=said, stderr=said, env={**os.environ, "PATH": _path(), **environment}
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


def _await(words: list[str], wanted: str, folder: Path, environment: dict[str, str]) -> None:
    until, said = time.monotonic() + PATIENCE, ""
    while time.monotonic() < until:
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=5)
            said = done.stdout + done.stderr
            if done.returncode == 0 and wanted in done.stdout:
                return
        time.sleep(0.3)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"SLURM does not come up: {said}\n{logs}")


@contextmanager
def one_node(folder: Path, cpus: int = 4) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the like speak to it. folder: for its configuration, state and logs; cpus:
    how many the node says it has, whatever this machine has.

    Raises:
        RuntimeError: the daemons do not answer, with what they have logged.
    """
    Path("/etc/slurm").mkdir(exist_ok=True)
    for name in ("munge", "etc", "state", "spool"):
        (folder / name).mkdir(parents=True, mode=0o755)
    host = socket.gethostname().split(".")[0]
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    (folder / "etc" / "slurm.conf").write_text(
        CONFIG.format(
            host=host, address=HOST, node=NODE, ports=_free_ports(), folder=folder, cpus=cpus, memory=memory * 9 // 10
        )
    )
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    with ExitStack() as stack:
        on_node = stack.enter_context(_network())
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *munge], folder / "munged.log"))
        conf = {"SLURM_CONF": environment["SLURM_CONF"]}
        _await(["munge", "--socket", f"{folder}/munge/socket", "--no-input"], "MUNGE:", folder, environment)
        stack.enter_context(_daemon(["slurmctld", "-D", "-i"], folder / "slurmctld.log", **conf))
        # A job's srun is given no SLURM_CONF by the plugin, so on the node the file is where it is looked for.
        place = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            'mount --bind "$0" /etc/slurm && exec slurmd -D -N node',
            folder / "etc",
        ]
        stack.enter_context(_daemon([*on_node, *place], folder / "slurmd.log", **conf))
        _await(["sinfo", "--noheader", "--format=%T"], "idle", folder, environment)
        yield environment


@dataclass(frozen=True)
class Site:
    """environment: in which the commands of SLURM reach the node, and Snakemake's jobs the hub if they could."""

    environment: dict[str, str]
    hub: Served

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of SLURM's."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)

    def queue(self, state: str = "all") -> list[str]:
        """Ids of the jobs in a state; by default of those that wait or run."""
        states = ["--states", state] if state != "all" else []
        return self.ask("squeue", "--noheader", "--format=%i", *states).stdout.split()

    def start(
        self, *arguments: object, cwd: Path, profile: list[object] = PROFILE, **environment: str
    ) -> subprocess.Popen[str]:
        # Whoever runs the tests in the background has them ignore Ctrl-C, and their children with them.
        words = ["env", "--default-signal=INT", BIN / "snakemake", "-s", REPOSITORY / "Snakefile", *profile, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            [*map(str, words)], cwd=cwd, env=self.environment | environment, start_new_session=True, **pipes
        )

    def snakemake(self, *arguments: object, cwd: Path, **others: object) -> tuple[int, str]:
        """Exit code, and what it said."""
        process = self.start(*arguments, cwd=cwd, **others)
        said = process.communicate(timeout=900)[0]
        return process.returncode, said
