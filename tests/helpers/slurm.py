"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, all private."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
# The life of a job's credential; a requeued job waits as long before it starts again (120 s by default).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Why SLURM cannot run here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"SLURM is not installed ({absent[0]}; Debian: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons are started by root alone"


def free_ports(count: int) -> list[int]:
    """Currently unused ports."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Cluster:
    """The daemons; :meth:`run` calls SLURM's commands on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=free_ports(3)))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.daemons: list[subprocess.Popen] = []
        places = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket")]
        places += [f"--{name}={folder}/munged.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", *places)
        self._wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "--noheader", "-o", "%D%t").strip() == "2idle", "the nodes")

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self.daemons)}.out", "wb") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
            )

    def _wait(self, done, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            ended = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                logs = "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"{what} did not come up ({ended}):\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Call a command of SLURM, retrying while the configuration is not ready; returns its output."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode and command[0] != "sinfo":
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, such as JobState and Restarts."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float) -> str:
        """Wait until a job has ended; its last state."""
        end = time.monotonic() + seconds
        while (state := self.state(job)["JobState"]) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state} after {seconds:g} s: {self.state(job)}")
            time.sleep(0.3)
        return state

    def close(self) -> None:
        """Cancel what runs and end the daemons, the controller first."""
        self.run("scancel", "--quiet", "--full", "--signal=KILL", "--user=root", check=False)
        for daemon in (*self.daemons[1:], self.daemons[0]):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)
