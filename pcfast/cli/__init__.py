"""The command line: ``pcfast``. One file a command.

Exit status of every command: 0; 1 where the work itself failed (a backend out of its bounds, a relaxation that
diverged); 2 for input that cannot be used, with one line that names cause and remedy; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from .._version import __version__
from ..errors import ArgumentError, PcfastError, RelaxationDiverged
from .bench import bench
from .check import check
from .compare import compare
from .completion import completion
from .diagnose import diagnose
from .info import info
from .train import train
from .tune import tune

_OPTIONS = {"folder": "--data-dir"}  # arguments of functions whose option has another name

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    # --step_size as well as --step-size, fixed-prediction as well as fixed_prediction
    "token_normalize_func": lambda token: token.replace("_", "-").lower(),
}


@click.group(context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="pcfast")
@click.pass_context
def pcfast(context: click.Context) -> None:
    """Predictive-coding training in PyTorch: train, compare with backpropagation, check the backends."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (train, compare, diagnose, check, tune, bench, info, completion):
    pcfast.add_command(command)


def main(
    arguments: Sequence[str] | None = None, command: click.Command = pcfast, name: str = "pcfast"
) -> int:
    """Run the command line; returns the exit status and never lets a traceback through for bad input.

    Args:
        arguments: without the program's name; None for those of this process.
        command: another one, with options named as those here. name: what it is started as.
    """
    try:
        return command.main(arguments, prog_name=name, standalone_mode=False) or 0
    except click.ClickException as error:
        return _fail(BAD_INPUT, error.format_message())
    except click.Abort as error:
        if os.environ.get("PCFAST_TRACEBACK"):
            traceback.print_exception(error)  # where it was: of what hangs
        return _fail(INTERRUPTED, str(error.__cause__ or "") or "stopped; nothing half-written is left", "")
    except RelaxationDiverged as error:
        return _fail(FAILED, _in_options(str(error)))
    except ArgumentError as error:
        return _fail(BAD_INPUT, f"{_option_of(error.argument)}{str(error).removeprefix(error.argument)}")
    except (PcfastError, ImportError, OSError) as error:
        return _fail(BAD_INPUT, str(error))
    except Exception as error:
        if os.environ.get("PCFAST_TRACEBACK"):
            raise
        hint = "(PCFAST_TRACEBACK=1 shows where)"
        return _fail(FAILED, f"{type(error).__name__}: {error} {hint}")


def _fail(status: int, message: str, prefix: str = "error: ") -> int:
    """One line on standard error."""
    print(f"{prefix}{' '.join(message.split())}", file=sys.stderr)
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
