"""A command that torchrun started on several processes: how they meet, and which of them says how it ended.

A launcher is known by the variables that torch's own ``env://`` reads: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ..backends.qualification.automatic import local_rank
from ..errors import ArgumentError
from ..training.checkpoints import read_run
from ..training.distributed import processes_of
from . import output
from .building import device_of

#: Of a checkpoint's ``kept``: the job, all restarts by its launcher included, that wrote it.
JOB = "job"
_JOB, _REASON = "pcfast/job", "reason"  # keys of stores
_POLL_S = 0.01
_LOST = re.compile(r"gloo|nccl|ucc|connection (closed|reset)|socket|broken pipe|timed out", re.I)


class ProcessLost(RuntimeError):
    """Another process of the run is gone and has said nothing."""


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def rank() -> int:
    """Of this process among those that one launcher started; 0 without one."""
    return int(os.environ["RANK"]) if launched() else 0


def check_alone(command: str) -> None:
    """Raise ArgumentError where a launcher started several processes of a command that takes one."""
    if launched() and int(os.environ["WORLD_SIZE"]) > 1:
        given, needed = f"{os.environ['WORLD_SIZE']} processes of pcfast {command}", "one process"
        raise ArgumentError("torchrun", given, needed, "It starts train, compare and bench --workers.")


class Launch:
    """The processes of a command, and the launcher's view of them.

    Attributes:
        group: as ``training.train`` takes it; None for a process that no launcher started.
        processes: what they agree on.
        job: names this job and all its restarts; None without a launcher.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        of_job: dist.Store | None = None,
        of_this_start: dist.Store | None = None,
    ) -> None:
        self.group, self.processes, self._store = group, processes_of(group), of_this_start
        self.job = None if of_job is None else of_job.compare_set(_JOB, "", os.urandom(8).hex()).decode()

    def device(self, name: str) -> torch.device:
        """``--device`` for this process: of GPUs each takes its own."""
        if self.group is None:
            return device_of(name)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device = torch.device("cuda", local_rank()) if name == "cuda" else device_of(name)
        if device.type != "cuda":
            return device
        needed = "--device cuda, of which each process takes the GPU of its local rank, or cpu"
        if name != "cuda" and self.processes.size > 1:
            raise ArgumentError("device", f"{name} on {self.processes.size} processes", needed)
        if device.index >= torch.cuda.device_count():
            given = f"{name} for local rank {local_rank()} where there are {torch.cuda.device_count()} GPUs"
            raise ArgumentError("device", given, needed, "Lower torchrun's --nproc-per-node.")
        torch.cuda.set_device(device)
        return device

    def restarted(self, out: Path, checkpoint: str) -> bool:
        """Whether the launcher started this job anew, and an earlier start left a checkpoint in ``out``."""
        if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) or not (out / checkpoint).is_file():
            return False
        return read_run(out / checkpoint)["config"]["kept"].get(JOB) == self.job

    def says(self, error: BaseException) -> bool:
        """Whether it is for this process to say ``error``: once for the whole job."""
        if isinstance(error, KeyboardInterrupt) or getattr(error, "of_all", False):
            return self.processes.leads
        mine = f"rank {self.processes.rank}: {os.urandom(8).hex()}"
        try:
            return self._store.compare_set(_REASON, "", mine).decode() == mine
        except RuntimeError:  # the store is gone, with the process that held it
            return True


def _of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the launcher's ``store`` that no earlier start has written to.

    torchrun keeps its store when it starts the processes anew, and with it the addresses of those that are gone, to
    which gloo would connect. Rank 0 names the part; the others ask with tickets, since they cannot tell by themselves
    what an earlier rank 0 has left.
    """
    if rank:
        ticket = os.urandom(8).hex()
        store.set(f"pcfast/ticket/{rank}", ticket)
        name = store.get(f"pcfast/start/{ticket}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return dist.PrefixStore(name, store)
    name, missing = f"pcfast/{os.urandom(8).hex()}", set(range(1, size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{name}/joined/{other}"]):
                missing.discard(other)
            elif store.check([f"pcfast/ticket/{other}"]):
                store.set(f"pcfast/start/{store.get(f'pcfast/ticket/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise ProcessLost(f"ranks {sorted(missing)} have not come within {store.timeout}")
        time.sleep(_POLL_S)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def joined() -> Iterator[Launch]:
    """Join the processes that the launcher started; without a launcher there is one.

    Whatever ends the block passes on, on every process; one of them is left to say it.
    """
    if not launched():
        yield Launch()
        return
    output.silenced = False  # until they can agree on it, each says what is wrong
    store, number, size = next(dist.rendezvous("env://"))
    of_this_start = _of_this_start(store, number, size)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo", store=of_this_start, rank=number, world_size=size
    )
    launch = Launch(dist.group.WORLD, store, of_this_start)
    try:
        yield launch
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and _LOST.search(str(error))
        output.silenced = not launch.says(error)
        if getattr(error, "of_all", False):
            dist.destroy_process_group()
            of_rank = getattr(error, "of_rank", 0)
            output.prefix = f"rank {of_rank}: " if of_rank else ""
            raise
        if not isinstance(error, KeyboardInterrupt):
            output.prefix = f"rank {number}: "
        if lost:
            said = "another process of the run is gone without a word, as one that was killed"
            raise ProcessLost(f"{said}; the last checkpoint can be resumed") from error
        raise
    dist.destroy_process_group()
