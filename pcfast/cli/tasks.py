"""``pcfast train --task reconstruct`` and ``--task generate``: decoders of images, and pictures of what they draw."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .. import datasets, networks
from ..datasets import Data
from ..errors import ArgumentError
from ..losses import half_squared_error
from ..model.graph import Graph
from ..precision import parameter_dtype
from ..problem.settings import Settings
from ..support import plotting
from ..training.generation import draw_images, inferred, reconstructions, samples
from .building import belief_optimizer_of, loaded, optimizer_of, with_defaults

GENERATIVE = ("reconstruct", "generate")
SAMPLES = "samples.png"
#: Where these are not given: settings with which digits reconstruct better than by as many principal components.
TASK_DEFAULTS = {
    "method": "error_based", "step_size": 0.03, "num_steps": 40, "optimizer": "adamw", "lr": 1e-3,
    "weight_decay": 0.1, "batch_size": 64, "epochs": 40, "widths": (128,), "latent": 16,
}  # fmt: skip
#: The hidden layers' beliefs stay near what z predicts, so that z has to say what the image is.
_LATENT_PRECISION, _HIDDEN_PRECISION, _DATA_PRECISION = 0.05, 10.0, 2.0
_NOT_THERE = ("net", "model", "preset", "beliefs", "loss", "nudging", "nudging_beta", "nudging_growth")
_IN_A_ROW, _ROWS_OF_SAMPLES = 10, 3  # images; rows where there are no classes
_INFERRED = 512  # training images whose latent variables say where to draw others


def check_task(given: Collection[str]) -> None:
    """Raise ArgumentError for an option that decoders have no use for."""
    for name in given:
        if name in _NOT_THERE:
            option = "--" + name.replace("_", "-")
            raise ArgumentError(
                name, f"{option} with --task reconstruct or generate", "none", "Its network is a decoder with "
                "squared errors: --widths and --latent say which.",
            )  # fmt: skip


def of_task(options: dict) -> tuple[Graph, Data, dict]:
    """Decoder, data and settings of training; the data's inputs are one-hot classes, its targets flat images."""
    chosen = with_defaults(options)
    source = datasets.SOURCES[chosen["data"]]
    classes = source.classes if chosen["task"] == "generate" else 0
    pixels = torch.Size(source.image_shape).numel()
    hidden = tuple(chosen["widths"])
    model = networks.decoder(chosen["latent"], [*hidden, pixels], nn.SiLU, classes=classes)
    dtype = parameter_dtype(chosen["precision"])
    model.to(dtype)
    data = datasets.one_hot(
        loaded(chosen["data"], chosen["data_dir"], "flat", seed=chosen["seed"]), source.classes
    )
    data = Data(data.y_train.to(dtype), data.x_train.to(dtype), data.y_test.to(dtype), data.x_test.to(dtype))
    precision = {f"h{k}": _HIDDEN_PRECISION for k in range(1, len(hidden) + 1)}
    settings = {
        **{name: chosen[name] for name in ("epochs", "batch_size", "method", "step_size", "num_steps")},
        "task": "reconstruct",
        "loss": half_squared_error,
        "reduction": "sum_beliefs_mean_weights",
        "node_precision": {"z": _LATENT_PRECISION, **precision, "x": _DATA_PRECISION},
        "belief_optimizer": belief_optimizer_of(chosen),
        "optimizer": optimizer_of(chosen),
    }
    return model, data, settings


def draw_samples(model: Graph, data: Data, settings: dict, options: dict, path: Path) -> None:
    """Draw test images, their reconstructions, and samples, of each class where the network reads it."""
    plotting.drawn(path, partial(_draw, model, data, settings, options))


@torch.no_grad()
def _draw(model: Graph, data: Data, settings: dict, options: dict, path: Path) -> None:
    device = next(model.parameters()).device
    relaxing = Settings(
        settings["loss"], settings["method"], settings["step_size"], settings["num_steps"],
        settings["belief_optimizer"], precision=settings["node_precision"], backend=options["backend"],
    )  # fmt: skip
    shape = datasets.SOURCES[options["data"]].image_shape

    def roots(labels):
        return {"label": labels.to(device)} if model.inputs else {}

    def shaped(values):
        return values.reshape(-1, *shape)

    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options["seed"])
        labels, shown = data.x_test[:_IN_A_ROW], data.y_test[:_IN_A_ROW]
        again = reconstructions(model, relaxing, labels.to(device), shown.to(device))
        rows, titles = [shaped(shown), shaped(again)], ["test", "reconstructed"]
        for k in range(data.x_train.shape[1] if model.inputs else _ROWS_OF_SAMPLES):
            of_class = data.x_train[:, k] == 1 if model.inputs else slice(None)
            labels, images = (part[of_class][:_INFERRED].to(device) for part in (data.x_train, data.y_train))
            z = inferred(model, relaxing, images, roots(labels))
            rows.append(shaped(samples(model, z, _IN_A_ROW, roots(labels[:1].expand(_IN_A_ROW, -1)))))
            titles.append(f"class {k}" if model.inputs else "samples")
    draw_images(
        rows, path, titles=titles, title=f"{options['task']}: {options['data']}, {options['latent']} latents"
    )
