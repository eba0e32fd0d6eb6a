"""What the options ask for: device, network, data, optimiser."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from .. import datasets, networks
from ..datasets import Data
from ..errors import ArgumentError
from ..precision import parameter_dtype
from ..presets.settings import PRESETS, Preset
from ..problem.belief_optimizers import Adam, BeliefOptimizer, GradientDescent
from ..problem.nudging import Nudging
from ..problem.validation import checked_device
from ..support.files import check_writable, write_json
from ..support.log import warn_once
from .defaults import DEFAULTS
from .options import OPTIMIZERS
from .user_model import checked_fit, user_model

_DATA_OF_NET = {"cnn": "mnist", "cifar-cnn": "cifar10"}


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
        raise ArgumentError("momentum", f"{momentum} with --optimizer {name}", "--optimizer sgd")
    return partial(OPTIMIZERS[name], **settings)


def belief_optimizer_of(options: dict) -> BeliefOptimizer | None:
    """What --belief-optimizer and the options beside it ask for; None for the default."""
    momentum, decay = options["belief_momentum"], options["belief_weight_decay"]
    nesterov = options["belief_nesterov"]
    if options["belief_optimizer"] == "adam":
        for name, given in (
            ("belief_momentum", momentum), ("belief_weight_decay", decay), ("belief_nesterov", nesterov),
        ):  # fmt: skip
            if given is not None:
                raise ArgumentError(name, f"{given} with --belief-optimizer adam", "--belief-optimizer gd")
        return Adam() if options["belief_eps"] is None else Adam(eps=options["belief_eps"])
    if options["belief_eps"] is not None:
        raise ArgumentError(
            "belief_eps", f"{options['belief_eps']} with --belief-optimizer gd", "--belief-optimizer adam"
        )
    if nesterov and not momentum:
        raise ArgumentError("belief_nesterov", "no --belief-momentum", "--belief-momentum X with X > 0")
    made = GradientDescent(momentum or 0.0, decay or 0.0, bool(nesterov))
    return None if made.plain else made


def nudging_of(options: dict) -> Nudging | None:
    """What --nudging and --nudging-beta ask for."""
    kind, beta = options["nudging"], options["nudging_beta"]
    if kind is not None:
        return Nudging(kind, 1.0 if beta is None else beta)
    for name in ("nudging_beta", "nudging_growth"):
        if options.get(name) is not None:
            raise ArgumentError(
                name, f"{options[name]} without --nudging", "--nudging positive, negative or centred"
            )
    return None


def preset_of(options: dict, given: Collection[str]) -> Preset:
    """What --preset makes of --step-size, --num-steps, --loss and, where the program has them, beliefs' options.

    Args:
        given: options that the command line names; others have their defaults.

    Raises:
        ArgumentError: an option that the program does not have, or no step size.
    """
    name = options["preset"]
    program = PRESETS[name]
    takes = inspect.signature(program).parameters
    if options["step_size"] is None:
        none = f"none with --preset {name}"
        raise ArgumentError("step_size", none, "the program's own step size, e.g. --step-size 0.1")
    optimizer = {n for n in ("belief_optimizer", "belief_momentum", "belief_weight_decay") if n in given}
    beside = {"belief_optimizer": belief_optimizer_of(options), "nudging": nudging_of(options)}
    for key, named in (("belief_optimizer", optimizer), ("nudging", {"nudging"})):
        if beside[key] is None:
            del beside[key]
        elif key not in takes:
            option = next(iter(sorted(named & set(given))), key)
            raise ArgumentError(
                option, f"{options[option]} with --preset {name}", "none", "That program has none."
            )
    if "method" in takes:
        beside["method"] = options["method"]
    made = program(
        step_size=options["step_size"], num_steps=options["num_steps"], loss=options["loss"], **beside
    )
    if "method" in given and options["method"] != made.method:
        raise ArgumentError("method", f"{options['method']} with --preset {name}", f"{made.method}, or none")
    return made


def loss_of_preset(name: str) -> str:
    """What --loss is with --preset ``name`` where it is not given."""
    return inspect.signature(PRESETS[name]).parameters["loss"].default


def device_of(name: str) -> torch.device:
    """``--device`` as a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(name)


def check_record(path: Path | None) -> None:
    """Before any work: make the folder that the file of --json, if any, goes to, and try to write there.

    Raises:
        ArgumentError: it cannot be made, or not be written to.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except OSError as error:
        needed = f"a file that can be written ({error.strerror})"
        raise ArgumentError("json", str(path), needed) from error


def kept_so_far(path: Path | None, record: dict) -> None:
    """Write what a run has found so far to the file of --json; a disk that is full then does not end the run."""
    if path is None:
        return
    try:
        write_json(path, record)
    except OSError as error:
        warn_once(f"{error}: the run continues, and writes all of it at its end")


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
                raise ArgumentError(option, f"--{option} beside --model", "one of the two", "Leave one out.")
        return in_precision(user_model(model), precision)
    net = net or DEFAULTS[data].net
    if net != "mlp" and widths is not None:
        raise ArgumentError(
            "widths", f"widths with --net {net}", "--net mlp", "The other networks are fixed."
        )
    channels, height, width = datasets.SOURCES[data].image_shape
    classes = datasets.SOURCES[data].classes
    if net == "mlp":
        sizes = [channels * height * width, *(widths or DEFAULTS[data].widths), classes]
        _check_memory(sizes)
        made = networks.mlp(sizes)
    elif net == "cnn":
        made = networks.mnist_cnn((channels, height, width), classes)
    else:
        made = networks.cifar_cnn((channels, height, width), classes)
    return made.to(parameter_dtype(precision))


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """``model`` in the dtype of --precision; complex parameters and buffers stay complex."""
    real = parameter_dtype(precision)
    kept = torch.complex128 if real == torch.float64 else torch.complex64

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to(kept)
        return tensor.to(real) if tensor.is_floating_point() else tensor

    return model._apply(converted)


def _check_memory(widths: list[int]) -> None:
    """Raise ArgumentError where weights of these widths, and their updates, are more than this machine has."""
    numbers = sum(a * b for a, b in itertools.pairwise(widths))
    needed, there = 2 * 4 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ArgumentError(
            "widths", f"{numbers:.3g} weights, which take {needed:.3g} bytes with their updates",
            f"weights that fit in this machine's {there:.3g} bytes", "Make layers narrower.",
        )  # fmt: skip


def network_and_sample_of(
    net: str | None,
    widths: tuple[int, ...] | None,
    model: str | None,
    data: str | None,
    input_shape: tuple[int, ...] | None,
) -> tuple[nn.Sequential, tuple[int, ...], str | None]:
    """For random inputs: the network, the shape of one sample, and the data set whose shapes these are, or None.

    Arguments as the options of those names; draws weights as :func:`network_of`.
    """
    if input_shape is not None and (model is None or data is not None):
        raise ArgumentError(
            "input_shape", "--input-shape with --net or --data", "--model", "They have shapes of their own."
        )
    source = data or _DATA_OF_NET.get(net, "digits")
    network = network_of(net, widths, model, data=source)
    if model is not None and data is None:
        return network, input_shape or _input_shape(network), None
    image = datasets.SOURCES[source].image_shape
    sample = (torch.Size(image).numel(),) if takes_flat_input(network) else tuple(image)
    return network, sample, source


def _input_shape(model: nn.Sequential) -> tuple[int, ...]:
    """The shape of one sample, where the network tells it."""
    if not takes_flat_input(model):
        raise ArgumentError(
            "input_shape", "none, for a --model that does not begin with a Linear", "the shape of one sample",
            "E.g. --input-shape 3,32,32.",
        )  # fmt: skip
    return (_first_module(model).in_features,)


def data_of(
    name: str,
    folder: Path | None,
    model: nn.Sequential,
    *,
    seed: int,
    loss: str = "cross_entropy",
    spec: str | None = None,
) -> Data:
    """The data set as ``model`` and ``loss`` need it: images or flat, in its dtype, one-hot targets for mse.

    ``spec``: what --model said, where it did; that network is tried on a sample.
    """
    shape = "flat" if takes_flat_input(model) else "image"
    data = in_dtype_of(model, loaded(name, folder, shape, seed=seed))
    if loss == "mse":
        data = datasets.one_hot(data, datasets.SOURCES[name].classes)
    if spec is not None:
        checked_fit(spec, model, data, datasets.SOURCES[name].classes)
    return data


def loaded(name: str, folder: Path | None, shape: str, *, seed: int) -> Data:
    """As :func:`pcfast.datasets.load`; errors name the options."""
    try:
        return datasets.load(name, folder=folder, shape=shape, seed=seed)
    except ArgumentError as error:
        if error.argument != "data":
            raise
        needed = f"--data-dir FOLDER with {datasets.SOURCES[name].files}; or an undamaged download"
        raise ArgumentError("data", error.given, needed) from error


def in_dtype_of(model: nn.Sequential, data: Data) -> Data:
    """``data`` with inputs in the dtype of the model's parameters."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return data._replace(x_train=data.x_train.to(dtype), x_test=data.x_test.to(dtype))


def takes_flat_input(model: nn.Sequential) -> bool:
    """Whether the first module is a Linear, parametrised or not; every other network is given images (N, C, H, W)."""
    return isinstance(_first_module(model), nn.Linear)


def _first_module(model: nn.Module) -> nn.Module | None:
    """The first module that an input meets inside Sequentials and residual blocks, but for elementwise ones."""
    if not isinstance(model, nn.Sequential):
        elementwise = isinstance(model, nn.Identity) or type(model).__module__ in _ELEMENTWISE
        return None if elementwise else model
    return next((result for module in model if (result := _first_module(module)) is not None), None)


_ELEMENTWISE = (nn.ReLU.__module__, nn.Dropout.__module__)
