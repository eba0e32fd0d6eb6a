"""Options that several commands share, and what they make: network, data, precision, device."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from .. import datasets, networks
from ..backends import BACKENDS
from ..datasets import Data
from ..errors import ArgumentError, ModelError
from ..network import Linear, describe
from ..planning import METHODS
from ..precision import PRECISIONS, parameter_dtype
from ..validation import checked_device
from .defaults import DEFAULTS, NUM_STEPS

NETS = ("mlp", "cnn", "cifar-cnn")
LOSSES = ("cross_entropy", "mse")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Numbers(click.ParamType):
    """A list of numbers: 0.1,0.2,1."""

    name = "numbers"

    def __init__(
        self, convert: Callable[[str], float], accepts: Callable[[float], bool], needed: str
    ) -> None:
        self.convert_one, self.accepts, self.needed = convert, accepts, needed

    def get_metavar(self, param, ctx=None) -> str:
        return "X,X,..."

    def convert(self, value, param, ctx) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(self.convert_one(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(self.accepts, numbers)):
            self.fail(f"{value!r}: needed are {self.needed}", param, ctx)
        return numbers


_WIDTHS = Numbers(int, lambda width: width >= 1, "whole numbers >= 1, e.g. 600,600")


def by_data(field: str) -> str:
    """The default of an option that depends on the data set, for the help text."""

    def shown(value) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    by_value: dict[str, list[str]] = {}
    for data, defaults in DEFAULTS.items():
        by_value.setdefault(shown(getattr(defaults, field)), []).append(data)
    values = "; ".join(f"{value} for {', '.join(names)}" for value, names in by_value.items())
    return f"  [default: {values}]"


def _together(*options: Callable) -> Callable:
    """Several option decorators as one; they stand in the help in the order given."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


network_options = _together(
    click.option("--net", type=click.Choice(NETS), help="A network of the paper." + by_data("net")),
    click.option(
        "--widths",
        type=_WIDTHS,
        help="Hidden layers of --net mlp." + by_data("widths"),
    ),
    click.option(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="Your own network instead: FUNCTION() returns an nn.Sequential whose elements are the PC layers.",
    ),
)
data_options = _together(
    click.option(
        "--data",
        type=click.Choice(list(DEFAULTS)),
        default="digits",
        show_default=True,
        help="Data set. digits comes with scikit-learn; the others are fetched from OpenML, or read from --data-dir.",
    ),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Folder with the data set's standard files, gzipped or not: IDX (MNIST, Fashion-MNIST), python batches "
        "(CIFAR-10).",
    ),
)
method_option = click.option(
    "--method", type=click.Choice(METHODS), default="strict", show_default=True, help="Relaxation."
)
relaxation_options = _together(
    click.option(
        "--step-size", type=float, metavar="ETA", help="Of the beliefs' updates." + by_data("step_size")
    ),
    click.option(
        "--num-steps",
        type=int,
        default=NUM_STEPS,
        show_default=True,
        metavar="N",
        help="Iterations of a relaxation.",
    ),
    click.option(
        "--loss", type=click.Choice(LOSSES), default="cross-entropy", show_default=True, help="Loss."
    ),
)
optimizer_options = _together(
    click.option(
        "--optimizer", type=click.Choice(list(OPTIMIZERS)), help="Of the parameters." + by_data("optimizer")
    ),
    click.option(
        "--lr",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="Learning rate." + by_data("lr"),
    ),
    click.option(
        "--weight-decay",
        metavar="X",
        type=click.FloatRange(min=0),
        help="Weight decay." + by_data("weight_decay"),
    ),
    click.option(
        "--momentum",
        metavar="X",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of --optimizer sgd.  [default: 0]",
    ),
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(min=1),
        help="Samples an update." + by_data("batch_size"),
    ),
)
machine_options = _together(
    click.option(
        "--backend",
        type=click.Choice(["auto", *BACKENDS]),
        default="auto",
        show_default=True,
        help="auto takes the fastest that runs the network.",
    ),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="ieee",
        show_default=True,
        help="Of matrix products: ieee is float32; tf32 needs a GPU; bf16 is autocast; fp64 is float64 throughout.",
    ),
    click.option(
        "--device",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, ...; auto: a GPU if any.",
    ),
)
seed_option = click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of initial weights, random data, the split of digits, and the order of samples.",
)
epochs_option = click.option(
    "--epochs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Passes over the training part in all." + by_data("epochs"),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")


def with_defaults(options: dict) -> dict:
    """``options`` with what the data set's defaults say where nothing was given; the network has its own."""
    defaults = {
        name: value
        for name, value in asdict(DEFAULTS[options["data"]]).items()
        if name not in ("net", "widths")  # network_of has to know what was given
    }
    return {name: defaults.get(name) if value is None else value for name, value in options.items()}


def optimizer_of(options: dict) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """What makes the optimiser of --optimizer, --lr, --weight-decay and --momentum from the parameters."""
    name, momentum = options["optimizer"], options["momentum"]
    settings = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
    if name == "sgd":
        settings["momentum"] = momentum or 0.0
    elif momentum is not None:
        raise ArgumentError("momentum", f"--momentum with --optimizer {name}", "--optimizer sgd")
    return partial(OPTIMIZERS[name], **settings)


def device_of(name: str) -> torch.device:
    """``--device`` as a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(name)


def network_of(
    net: str | None,
    widths: tuple[int, ...] | None,
    model: str | None,
    *,
    data: str,
    precision: str = "ieee",
) -> nn.Sequential:
    """The network that --net, --widths and --model ask for, for inputs and classes of the data set ``data``.

    Draws its weights from torch's global random state: seed it first.
    """
    if model is not None:
        for option, given in (("net", net), ("widths", widths)):
            if given is not None:
                raise ArgumentError(option, f"{option} beside --model", "one of the two", "Leave one out.")
        return user_model(model).to(parameter_dtype(precision))
    net = net or DEFAULTS[data].net
    if net != "mlp" and widths is not None:
        raise ArgumentError(
            "widths", f"--widths with --net {net}", "--net mlp", "The other networks are fixed."
        )
    channels, height, width = datasets.SOURCES[data].image_shape
    classes = datasets.SOURCES[data].classes
    if net == "mlp":
        made = networks.mlp([channels * height * width, *(widths or DEFAULTS[data].widths), classes])
    elif net == "cnn":
        made = networks.mnist_cnn((channels, height, width), classes)
    else:
        made = networks.cifar_cnn((channels, height, width), classes)
    return made.to(parameter_dtype(precision))


def data_of(
    name: str, folder: Path | None, model: nn.Sequential, *, seed: int, loss: str = "cross_entropy"
) -> Data:
    """The data set as ``model`` and ``loss`` need it: images or flat, in its dtype, one-hot targets for mse."""
    shape = "flat" if takes_flat_input(model) else "image"
    data = datasets.load(name, folder=folder, shape=shape, seed=seed)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    data = data._replace(x_train=data.x_train.to(dtype), x_test=data.x_test.to(dtype))
    if loss == "mse":
        classes = datasets.SOURCES[name].classes
        one_hot = {part: F.one_hot(getattr(data, part), classes).to(dtype) for part in ("y_train", "y_test")}
        data = data._replace(**one_hot)
    return data


def takes_flat_input(model: nn.Sequential) -> bool:
    """Whether the first operation is a Linear; every other network is given images (N, C, H, W)."""
    operations = [op for layer in describe(model).layers for op in layer.ops]
    return bool(operations) and isinstance(operations[0], Linear)


def user_model(spec: str) -> nn.Sequential:
    """What FUNCTION of ``FILE.py:FUNCTION`` returns.

    Raises:
        ArgumentError, ModelError: in one line, whatever goes wrong in that file.
    """
    file, colon, function = spec.rpartition(":")
    needed = "FILE.py:FUNCTION, where FUNCTION() returns an nn.Sequential"
    if not colon or not function.isidentifier():
        raise ArgumentError("model", repr(spec), needed)
    path = Path(file)
    if not path.is_file():
        raise ArgumentError("model", f"{file}, which is no file", needed)
    name = f"pcfast_user_model_{abs(hash(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None:
        raise ArgumentError("model", f"{file}, which is no Python file", needed)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # as import does: pickling and dataclasses look modules up there
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours can be imported, as by `python FILE.py`
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise ArgumentError("model", f"{file} without a function {function}", needed)
        model = make()
    except ArgumentError:
        raise
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            "model", f"{spec}, which raised {type(error).__name__}: {error}", needed, f"Try: python {file}"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    try:
        describe(model)
    except ModelError as error:
        raise ModelError(
            "model", f"{spec}, which returned {error.given}", error.needed, error.remedy
        ) from None
    if next(model.parameters(), None) is None:
        raise ModelError("model", f"{spec}, which returned a network without parameters", "at least one")
    return model
