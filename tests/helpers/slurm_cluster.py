"""A private SLURM of virtual nodes on this machine, for tests: munged, slurmctld and a slurmd for each node.

No systemd, no cgroups, no database, nothing in /etc: all files lie in one folder. Needs root, because slurmd
does, and Debian's packages (`tools.py`). By hand:

    python tests/helpers/slurm_cluster.py FOLDER          # starts it, prints `export SLURM_CONF=...`
    python tests/helpers/slurm_cluster.py FOLDER --stop

Partition `main` preempts nothing; jobs of `urgent` make those of `main` stop and go back into the queue.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "RCPO_TEST_NODE"
"""Environment variable of a slurmd and of what it starts itself: which node of which cluster it plays."""
SECONDS_TO_START = 30
CPUS = 8
"""That a node claims to have."""

SLURM_CONF = """\
ClusterName=rcpo
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire seconds before it starts again: 120 unless told.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize={max_array_size}
JobRequeue=1
ReturnToService=2
# A node that does not answer for this long is down, and its jobs go back into the queue.
SlurmdTimeout=5
InactiveLimit=0
KillWait=30
MinJobAge=3600
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=20 OverTimeLimit=0
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def wait_until(is_true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of `count` consecutive TCP ports that are free, below those that the kernel hands out."""
    for first in range(18000 + os.getpid() % 1000, 20000 - count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")


def short_host() -> str:
    return socket.gethostname().split(".")[0]


class Cluster:
    """One cluster; `folder` is its own."""

    def __init__(self, folder: Path, num_nodes: int = 2, spare: int = 0, max_array_size: int = 1001) -> None:
        """`spare` more nodes have the feature of that name; every node claims `CPUS` CPUs."""
        self.folder, self.nodes = folder, [f"n{number}" for number in range(num_nodes + spare)]
        self.conf = folder / "slurm.conf"
        self._num_spare, self.max_array_size = spare, max_array_size

    @property
    def env(self) -> dict[str, str]:
        """The environment in which this machine's SLURM commands mean this cluster."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        return own | {"SLURM_CONF": str(self.conf)}

    def run(self, *words: object) -> str:
        """Output of a SLURM command that must succeed."""
        command = [str(word) for word in words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start all daemons; returns when the nodes take jobs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        port = free_ports(1 + len(self.nodes))
        self.conf.write_text(
            SLURM_CONF.format(
                host=short_host(), folder=self.folder, port=port,
                nodes="\n".join(self._node_line(idx, port + 1 + idx) for idx in range(len(self.nodes))),
                max_array_size=self.max_array_size,
            )
        )  # fmt: skip
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge/key"
        key.parent.mkdir(mode=0o700, exist_ok=True)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        munge = {
            "key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munged.pid",
            "log-file": key.with_name("log"), "seed-file": key.with_name("seed"),
        }  # fmt: skip
        self._daemon("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self._daemon("slurmctld", "-c", "-f", self.conf)
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: set(self.idle_nodes()) == set(self.nodes), SECONDS_TO_START, "nodes are idle")

    def _node_line(self, idx: int, port: int) -> str:
        features = " Features=spare" if idx >= len(self.nodes) - self._num_spare else ""
        place = f"NodeName=n{idx} NodeHostname={short_host()} NodeAddr=127.0.0.1 Port={port}"
        return f"{place} CPUs={CPUS} RealMemory=8000{features}"

    def _daemon(self, *words: object, mark: str = "") -> None:
        """Start a program that puts itself into the background."""
        env = self.env | {MARK: f"{self.folder}:{mark}", "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        log = self.folder / f"{words[0]}.err"
        with log.open("ab") as stream:
            done = subprocess.run(
                [str(word) for word in words], env=env, stdout=stream, stderr=stream, timeout=SECONDS_TO_START
            )
        assert done.returncode == 0, f"{words[0]}: {log.read_text()[-2000:]}"

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._daemon("slurmd", "-N", node, "-f", self.conf, mark=node)

    def idle_nodes(self) -> list[str]:
        with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
            return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()
        return []

    def lose_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd and every process of its jobs, at once."""
        names = (f"{MARK}={self.folder}:{node}", f"SLURMD_NODENAME={node}")
        self._kill(lambda env: names[0] in env or (names[1] in env and self._is_own(env)))

    def kill_task(self, task: str) -> None:
        """End every process of a task of an array at once, as a machine does that is out of memory."""
        array, index = task.split("_")
        names = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={index}"}
        self._kill(lambda env: names <= env and self._is_own(env))

    def _kill(self, wanted: Callable[[set[str]], bool]) -> None:
        for pid in list(self._processes(wanted)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_own(self, env: set[str]) -> bool:
        return f"SLURM_CONF={self.conf}" in env

    def _processes(self, wanted: Callable[[set[str]], bool]) -> Iterator[int]:
        """Processes by their environment."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    env = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
                    if wanted(env):
                        yield int(entry.name)

    def stop(self) -> None:
        """End all jobs and daemons of this cluster, and nothing else."""

        def ours(env: set[str]) -> bool:
            in_job = self._is_own(env) and any(word.startswith("SLURM_JOB_ID=") for word in env)
            return in_job or any(word.startswith(f"{MARK}={self.folder}:") for word in env)

        self._kill(ours)


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).absolute())
    if sys.argv[2:] == ["--stop"]:
        cluster.stop()
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from helpers.tools import missing

        if fault := missing("slurm"):
            sys.exit(fault)
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}")
