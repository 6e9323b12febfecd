"""Run a private Slurm on this machine: munged, slurmctld and slurmd from Debian packages, in a temporary folder.

It needs no systemd, cgroups or database, and has its own key, sockets and ports, so that it does not touch a Slurm that
runs here already. Root is needed for the packages and for slurmd.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.helpers.processes import ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
DEVICES = [
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")
]  # stand for its GPUs; any device will do
NUM_TASKS = 8  # the node claims as many cores, so that two jobs of two tasks never wait for each other
CREDENTIAL_SECONDS = 5  # how long a requeued job is held; Slurm's minimum, its default is 120
CONFIG = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
DependencyParameters=disable_remote_singleton
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=60
MinJobAge=3600
InactiveLimit=0
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=128000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=toy Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class SlurmCluster:
    """Manage a cluster between `start` and `stop`, which also cleans up after a failed start.

    folder: new, and with a short path, because sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Install what is missing, write the configuration, start the daemons and wait for the node."""
        install_packages()
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o700)
        self._write_configuration()
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._launch("munged", "--foreground", "--force", "--num-threads=2", f"--socket={munge}/socket", *files)
        wait_for("munge's socket", (munge / "socket").exists, 30)
        self._launch("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        self._launch("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        wait_for("the node", lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"), 60)

    def stop(self) -> None:
        """Cancel every job, and end the daemons and all their processes."""
        if len(self._daemons) == 3:
            self._cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        left = self.processes()
        for process in left:
            process.kill()
        psutil.wait_procs(left, 10)

    def submit(self, *words: str, **environment: str) -> int:
        """Run sbatch in the repository's root and return the job's number."""
        output = self.run("sbatch", "--parsable", *words, **environment)
        return int(output.strip())

    def run(self, *command: str, **environment: str) -> str:
        """Run a command of Slurm, or one that calls such, and return its output. Raises AssertionError if it fails."""
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}{self.logs()}"
        return result.stdout

    def ask(self, *command: str) -> str:
        """Return the output of a command that may fail while the daemons start."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return result.stdout

    def show(self, job: int | str) -> dict[str, str]:
        """Return what scontrol knows about a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", str(job))))

    def state(self, job: int | str) -> str:
        """Return PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT ..."""
        return self.show(job)["JobState"]

    def wait(self, job: int | str, state: str, seconds: float = 300) -> dict[str, str]:
        """Wait until the job is in `state`. Raises AssertionError if it ends in another one."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"} - {state}

        def reached() -> bool:
            now = self.state(job)
            assert now not in ended, f"job {job} is {now}, not {state}\n{self.logs()}"
            return now == state

        wait_for(f"job {job} to be {state}", reached, seconds)
        return self.show(job)

    def logs(self) -> str:
        """Return the last part of the daemons' logs."""
        paths = [self.folder / "slurmctld.log", self.folder / "slurmd.log"]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def processes(self) -> list[psutil.Process]:
        """Return all live processes with the cluster's folder in their command, environment or open files.

        The open files are needed because slurmstepd overwrites the other two with its title.
        """
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            words = [*process.cmdline(), *process.environ().values(), *(file.path for file in process.open_files())]
        except psutil.Error:
            return False
        return any(str(self.folder) in word for word in words)

    def _write_configuration(self) -> None:
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            controller_port=find_free_port(),
            node_port=find_free_port(),
            expire=CREDENTIAL_SECONDS,
            cpus=NUM_TASKS,
            gpus=len(DEVICES),
        )
        (self.folder / "slurm.conf").write_text(text)
        gpus = "".join(f"Name=gpu File={device}\n" for device in DEVICES)
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")

    def _launch(self, *command: str) -> None:
        """Start a daemon in the foreground; the kernel ends it if this process is killed."""
        program = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
        log = (self.folder / f"{command[0]}.out").open("wb")
        words = ["setpriv", "--pdeathsig", "KILL", program, *command[1:]]
        self._daemons.append(
            subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def _cancel_all(self) -> None:
        self.ask("scancel", "--user=root", "--signal=KILL", "--full")
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + 20
        while self.ask("squeue", "--noheader").strip() and time.monotonic() < deadline:
            time.sleep(0.2)


def install_packages() -> None:
    """Install Debian's Slurm if it is missing. Raises AssertionError with apt's output if that fails."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if all(shutil.which(program) for program in PROGRAMS):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        result = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"apt-get {' '.join(command)}: {result.stdout}{result.stderr}"


def why_not() -> str | None:
    """Return why this machine cannot run a private Slurm, or None."""
    if os.geteuid() != 0:
        return "a private Slurm needs root to install packages and run slurmd"
    if not shutil.which("apt-get") and not shutil.which("slurmctld"):
        return "slurmctld is not installed, and there is no apt-get to install it"
    return None


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until the condition holds. Raises AssertionError if it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def find_free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
