"""Options that several commands share."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import click
import torch
from click.shell_completion import CompletionItem

from ..backends import BACKENDS
from ..precision import PRECISIONS
from ..presets.settings import PRESETS
from ..problem.nudging import KINDS as NUDGES
from ..problem.plan import TRAINING_METHODS, canonical, in_words
from ..recipes import RECIPES
from ..training.optimizers import adam
from ..training.trainer import MAX_EPOCHS, MAX_SAMPLES, MAX_STEPS
from .defaults import DEFAULTS, NUM_STEPS
from .output import only_json

NETS = ("mlp", "cnn", "cifar-cnn")
LOSSES = ("cross_entropy", "mse")
BELIEF_OPTIMIZERS = ("gd", "adam")
OPTIMIZERS = {"adam": adam, "adamw": functools.partial(adam, kind=torch.optim.AdamW), "sgd": torch.optim.SGD}


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


class Count(click.IntRange):
    """A whole number from ``min`` to ``max``; larger ones are slips of the keyboard."""

    def __init__(self, min: int | None = 1, max: int = MAX_SAMPLES) -> None:
        super().__init__(min, max)

    def get_metavar(self, param, ctx=None) -> str:
        return "N"


class Finite(click.FloatRange):
    """A number in a range; NaN and infinity are none."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class Folder(click.Path):
    """A folder to write to; it need not be there."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx) -> Path:
        if value == "":
            self.fail("an empty name is no folder", param, ctx)
        return super().convert(value, param, ctx)


class Method(click.Choice):
    """A method; the field's other words for one are taken too (planning.ALIASES)."""

    def convert(self, value, param, ctx):
        alias = canonical(value.lower()) if isinstance(value, str) else value
        try:
            return super().convert(alias if alias in self.choices else value, param, ctx)
        except click.BadParameter as error:
            raise click.BadParameter(
                f"{error.message} Other words for them: {in_words()}.", ctx, param
            ) from None


class RecipeName(click.ParamType):
    """The name of a recipe."""

    name = "recipe"

    def convert(self, value, param, ctx) -> str:
        if value not in RECIPES:
            near = difflib.get_close_matches(value, RECIPES, n=3) or list(RECIPES)[:3]
            self.fail(f"{value!r} is none; e.g. {', '.join(near)} (docs/recipes.md has them all)", param, ctx)
        return value

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(name) for name in RECIPES if name.startswith(incomplete)]


_WIDTHS = Numbers(int, lambda width: 1 <= width <= MAX_SAMPLES, "whole numbers >= 1 below 2^31, e.g. 600,600")


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
shape_options = _together(
    click.option(
        "--data",
        type=click.Choice(list(DEFAULTS)),
        help="Take the shape of this data set's samples; the inputs themselves are random.  [default: the data set "
        "of --net; digits]",
    ),
    click.option(
        "--input-shape",
        type=Numbers(
            int, lambda size: 1 <= size <= MAX_SAMPLES, "whole numbers >= 1 below 2^31, e.g. 3,32,32"
        ),
        metavar="N,N,...",
        help="Shape of one sample for --model.  [default: from --data, or from a Linear that comes first]",
    ),
)
data_options = _together(
    click.option(
        "--data",
        type=click.Choice(list(DEFAULTS)),
        default="digits",
        show_default=True,
        help="Data set. digits comes with scikit-learn; cifar100 is read from --data-dir; the others too, or "
        "fetched from OpenML.",
    ),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Folder with the data set's standard files, gzipped or not: IDX (MNIST, Fashion-MNIST), binary batches "
        "(CIFAR-10, CIFAR-100).",
    ),
)
METHOD_HELP = f"Relaxation. The field's other words are taken too: {in_words()}."
method_option = click.option(
    "--method", type=Method(TRAINING_METHODS), default="strict", show_default=True, help=METHOD_HELP
)
preset_option = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Another program's convention (docs/conventions.md): loss, reduction, number of moves and scale of the "
    "updates from --loss, --step-size and --num-steps as that program takes them.",
)
relaxation_options = _together(
    click.option(
        "--step-size", type=float, metavar="ETA", help="Of the beliefs' updates." + by_data("step_size")
    ),
    click.option(
        "--num-steps",
        type=Count(None, MAX_STEPS),
        default=NUM_STEPS,
        show_default=True,
        metavar="N",
        help="Iterations of a relaxation.",
    ),
    click.option(
        "--loss", type=click.Choice(LOSSES), default="cross-entropy", show_default=True, help="Loss."
    ),
)
belief_optimizer_options = _together(
    click.option(
        "--belief-optimizer",
        type=click.Choice(BELIEF_OPTIMIZERS),
        default="gd",
        show_default=True,
        help="What moves the beliefs: gradient descent or Adam.",
    ),
    click.option(
        "--belief-momentum",
        metavar="X",
        type=Finite(0, 1, max_open=True),
        help="Of --belief-optimizer gd.  [default: 0]",
    ),
    click.option(
        "--belief-eps", metavar="X", type=Finite(min=0, min_open=True), help="Of adam.  [default: 1e-8]"
    ),
    click.option(
        "--belief-nesterov", is_flag=True, default=None, help="Nesterov's form of --belief-momentum."
    ),
    click.option(
        "--belief-weight-decay",
        metavar="X",
        type=Finite(min=0),
        help="Pulls beliefs towards 0; of --belief-optimizer gd.  [default: 0]",
    ),
)
nudging_options = _together(
    click.option(
        "--nudging",
        type=click.Choice(NUDGES),
        help="Relax towards (or away from) a target part of the way to y; with --method strict --loss mse.",
    ),
    click.option(
        "--nudging-beta",
        metavar="X",
        type=Finite(min=0, min_open=True),
        help="What part of the way.  [default: 1]",
    ),
)
belief_options = _together(
    belief_optimizer_options,
    nudging_options,
    click.option(
        "--nudging-growth",
        metavar="X",
        type=Finite(min=0),
        help="What --nudging-beta gains every epoch, as far as 1.  [default: 0]",
    ),
)
optimizer_options = _together(
    click.option(
        "--optimizer", type=click.Choice(list(OPTIMIZERS)), help="Of the parameters." + by_data("optimizer")
    ),
    click.option(
        "--lr",
        metavar="X",
        type=Finite(min=0, min_open=True),
        help="Learning rate." + by_data("lr"),
    ),
    click.option(
        "--weight-decay",
        metavar="X",
        type=Finite(min=0),
        help="Weight decay." + by_data("weight_decay"),
    ),
    click.option(
        "--momentum",
        metavar="X",
        type=Finite(0, 1, max_open=True),
        help="Of --optimizer sgd.  [default: 0]",
    ),
    click.option(
        "--batch-size",
        metavar="N",
        type=Count(),
        help="Samples an update." + by_data("batch_size"),
    ),
)
device_option = click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, ...; auto: a GPU if any.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="auto takes the fastest that runs the network.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="ieee",
    show_default=True,
    help="Of matrix products: ieee is float32; tf32 needs a GPU; bf16 is autocast; fp64 is float64 throughout.",
)
machine_options = _together(backend_option, precision_option, device_option)
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
    type=Count(max=MAX_EPOCHS),
    help="Passes over the training part in all." + by_data("epochs"),
)

record_option = click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the record.",
)


def _on_json(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value and not context.resilient_parsing:
        context.with_resource(only_json())
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_on_json,
    help="Print one JSON object instead of tables; where the command fails, none.",
)
