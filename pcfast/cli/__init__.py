"""The command line: ``pcfast``. One file a command.

Exit status of every command: 0; 1 where the work itself failed (a backend out of its bounds, a relaxation that
diverged); 2 for input that cannot be used and files that cannot be written, with one line that names cause and
remedy; 130 after Ctrl-C, SIGTERM or SIGHUP; 141, without a word, where the reader of a pipe left before the end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import click

from .._version import __version__
from ..errors import ArgumentError, PcfastError, RelaxationDiverged
from ..support import startup
from ..training.progress import takes_over
from . import launch, output
from .bench import bench
from .check import check
from .compare import compare
from .completion import completion
from .diagnose import diagnose
from .explain import explain
from .info import info
from .output import flush_output, open_closed_streams, printable_whatever_it_is
from .qualify import qualify
from .train import train
from .tune import tune
from .which import which

_OPTIONS = {"folder": "--data-dir"}  # arguments of functions whose option has another name

FAILED, BAD_INPUT, INTERRUPTED, NO_READER = 1, 2, 130, 141
_NO_MEMORY = re.compile(
    r"can't allocate|not enough memory|out of memory|Storage size calculation overflowed", re.I
)

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    # --step_size as well as --step-size, fixed-prediction as well as fixed_prediction
    "token_normalize_func": lambda token: token.replace("_", "-").lower(),
}


class _Program(click.Group):
    """Keeps errors of writing from click, which ends with status 1 where the reader of a pipe has left."""

    def make_context(self, *arguments, **options) -> click.Context:  # prints help and version
        with _no_reader():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context):
        try:
            with _no_reader():
                return super().invoke(context)
        except SystemExit as error:
            raise _Ended(
                f"the network, or what it calls, ended the program: SystemExit({error.code})"
            ) from error


class _Ended(Exception):
    """Code of the user's called sys.exit."""


class _NoReader(Exception):
    """Nobody reads what is printed."""


@contextlib.contextmanager
def _no_reader() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _NoReader from error


@click.group(cls=_Program, context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="pcfast")
@click.pass_context
def pcfast(context: click.Context) -> None:
    """Predictive-coding training in PyTorch: train, compare with backpropagation, check the backends."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    elif pcfast.commands[context.invoked_subcommand] not in _ON_PROCESSES:
        launch.check_alone(context.invoked_subcommand)


#: Which processes of a launcher run together, bench with --workers.
_ON_PROCESSES = (train, compare, bench)

for command in (train, compare, diagnose, check, explain, which, qualify, tune, bench, info, completion):
    pcfast.add_command(command)


def main(
    arguments: Sequence[str] | None = None, command: click.Command = pcfast, name: str = "pcfast"
) -> int:
    """Run the command line; returns the exit status and never lets a traceback through for bad input.

    Args:
        arguments: without the program's name; None for those of this process.
        command: another one, with options named as those here. name: what it is started as.
    """
    open_closed_streams()
    printable_whatever_it_is()
    output.silenced, output.prefix = launch.rank() != 0, ""
    with _stopped_by_signals():
        status = _status(lambda: command.main(arguments, prog_name=name, standalone_mode=False) or 0)
        if launch.launched():
            # process groups that a caught error's frames hold: their threads abort an interpreter that ends before
            gc.collect()
        return _status(flush_output) or status


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop as Ctrl-C does, which is itself again after the imports."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        startup.end()
        for number in filter(takes_over, (signal.SIGTERM, signal.SIGHUP)):
            previous[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _status(work: Callable[[], int | None]) -> int:
    """What ``work`` returns, or the exit status of what it raises, with its one line."""
    try:
        return work() or 0
    except click.ClickException as error:
        return _fail(BAD_INPUT, error.format_message())
    except (click.Abort, KeyboardInterrupt) as error:
        if os.environ.get("PCFAST_TRACEBACK"):
            traceback.print_exception(error)  # where it was: of what hangs
        said = str(error.__cause__ or "") or "stopped; nothing half-written is left"
        return _fail(INTERRUPTED, said, "")
    except (_NoReader, BrokenPipeError):
        return NO_READER
    except RelaxationDiverged as error:
        return _fail(FAILED, _in_options(str(error)))
    except ArgumentError as error:
        return _fail(BAD_INPUT, f"{_option_of(error.argument)}{str(error).removeprefix(error.argument)}")
    except OSError as error:
        of_output = "" if error.filename or not error.errno else "standard output cannot be written: "
        return _fail(BAD_INPUT, f"{of_output}{error}")
    except (PcfastError, ImportError, _Ended) as error:
        return _fail(BAD_INPUT, str(error))
    except Exception as error:
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
        ):
            text = str(error).partition("\n")[0][:200]
            return _fail(
                BAD_INPUT, f"not enough memory for sizes as large as these ({text or 'MemoryError'})"
            )
        if os.environ.get("PCFAST_TRACEBACK"):
            raise
        hint = "(PCFAST_TRACEBACK=1 shows where)"
        return _fail(FAILED, f"{type(error).__name__}: {error} {hint}")


def _fail(status: int, message: str, prefix: str = "error: ") -> int:
    """One line on standard error; nothing where another process of the command says it."""
    if output.silenced:
        return status
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        print(f"{prefix}{output.prefix}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _in_options(message: str) -> str:
    """A message of the library with the names of arguments as they are typed here."""
    for argument, option in (
        ("step_size", "--step-size"), ("num_steps", "--num-steps"),
        ('method="fixed_prediction"', "--method fixed-prediction"),
    ):  # fmt: skip
        message = message.replace(argument, option)
    return message


def _option_of(argument: str) -> str:
    """The option that sets ``argument`` of a function, as it is typed; the argument where there is none."""
    option = _OPTIONS.get(argument, "--" + argument.replace("_", "-"))
    known = {name for command in pcfast.commands.values() for p in command.params for name in p.opts}
    return option if option in known else argument
