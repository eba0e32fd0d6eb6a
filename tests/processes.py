"""Processes of one torch.distributed job, from a server that has imported pcfast once; they end with the test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pcfast.cli", "pcfast.backends.cpu", "torch._dynamo", "matplotlib.figure", "sklearn.model_selection"]
)
#: Gloo asks for no host name.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def on_processes(function: Callable, size: int, *arguments, limit: float = 60.0, restarts: int = 0) -> list:
    """What ``function(*arguments)`` returns on each of ``size`` processes of a launcher; a killed one gives None.

    An exception on a process is raised here. ``restarts``: as many starts the launcher has made before.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # the launcher's, on a free port
    running = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        variables = _variables(rank, size, store.port, restarts)
        process = _CONTEXT.Process(target=_run, args=(there, variables, function, arguments), daemon=True)
        process.start()
        there.close()
        running.append((process, here))
    try:
        deadline = time.monotonic() + limit
        answers = []
        for process, here in running:
            assert wait([here], max(deadline - time.monotonic(), 0)), f"no answer within {limit:g} s"
            try:
                answers.append(pickle.loads(here.recv_bytes()))
            except EOFError:
                answers.append((True, None))
            process.join(max(deadline - time.monotonic(), 0))
    finally:
        for process, _ in running:
            process.kill()
            process.join()
    for fine, answer in answers:
        if not fine:
            raise AssertionError(answer)
    return [answer for _, answer in answers]


def _variables(rank: int, size: int, port: int, restarts: int) -> dict[str, str]:
    """Those that torchrun sets."""
    return {
        **ENVIRONMENT,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
    }


def _run(pipe, variables: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(variables)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        answer = True, function(*arguments)
    except BaseException as error:
        import traceback

        answer = False, f"rank {variables['RANK']}: {''.join(traceback.format_exception(error))}"
    pipe.send_bytes(pickle.dumps(answer))  # tensors by value: this process does not wait to be asked for them
    pipe.close()
    os._exit(0)  # nobody waits for what a failed collective left


def in_group(function: Callable, *arguments):
    """``function(*arguments)`` in the default process group; for :func:`on_processes`."""
    dist.init_process_group("gloo")
    answer = function(*arguments)
    dist.destroy_process_group()
    return answer


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of ``pcfast``; for :func:`on_processes`."""
    from pcfast.cli import main

    with tempfile.TemporaryDirectory() as folder:
        texts = []
        for number in (1, 2):
            path = Path(folder) / str(number)
            texts.append(path)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        status = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        return status, *(path.read_text() for path in texts)
