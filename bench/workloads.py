"""What is timed: whole training steps (forward pass, relaxation, weight gradients) of named networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pcfast import networks


@dataclass(frozen=True)
class Workload:
    """One training step to time.

    Attributes:
        name: as on the command line.
        make: a fresh network, float32 on the CPU.
        sample: shape of one input. classes: of the output.
        batch: rows.
        method, step_size, num_steps: of the relaxation.
        lr: of plain gradient descent on the parameters, in incremental alone: in the others they stay.
        quick: also part of a quick run.
        about: the network in a few words.
    """

    name: str
    make: Callable[[], nn.Sequential]
    sample: tuple[int, ...]
    batch: int
    about: str
    classes: int = 10
    method: str = "strict"
    step_size: float = 0.1
    num_steps: int = 20
    lr: float = 0.0
    quick: bool = False

    def draw(self, device: torch.device, rows: int | None = None, seed: int = 0):
        """(model, x, y): random weights, inputs of unit variance and labels, float32 on ``device``."""
        torch.manual_seed(seed)
        model = self.make().to(device)
        rows = rows or self.batch
        x: Tensor = torch.randn(rows, *self.sample)
        y = torch.randint(0, self.classes, (rows,))
        return model, x.to(device), y.to(device)


_MLP = "784-600-600-10 relu"
_CNN = "the paper's MNIST network"


def _mlp_600_first() -> nn.Sequential:
    """mlp_600 whose beliefs are pre-activations: activations begin layers instead of ending them."""
    first, second, last = networks.mlp_600()
    return nn.Sequential(first[0], nn.Sequential(first[1], second[0]), nn.Sequential(second[1], last))


#: By name, what matters most first: a run that has to stop early has those.
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("mlp_600", networks.mlp_600, (784,), 300, _MLP, quick=True),
        Workload("mnist_cnn", networks.mnist_cnn, (1, 28, 28), 300, _CNN, quick=True),
        Workload("mlp_128", partial(networks.mlp, (784, 128, 128, 10)), (784,), 128, "784-128-128-10 relu"),
        Workload("mlp_600_fixed", networks.mlp_600, (784,), 300, _MLP, method="fixed_prediction", quick=True),
        Workload("mlp_600_exact", networks.mlp_600, (784,), 300, _MLP, method="exact", quick=True),
        Workload(
            "tiny_exact",
            partial(networks.mlp, (4, 3, 3, 3, 2)),
            (4,),
            2,
            "4-3-3-3-2 relu",
            2,
            "exact",
            quick=True,
        ),
        Workload("cifar_cnn", networks.cifar_cnn, (3, 32, 32), 256, "the paper's CIFAR-10 network"),
        Workload("vgg5", networks.vgg5, (3, 32, 32), 128, "128-256-512-512 convolutions"),
        Workload("wide_mlp", networks.wide_mlp, (4096,), 1024, "4 layers of 4096", 4096),
        *(
            Workload(
                f"deep_mlp_{depth}",
                partial(networks.deep_mlp, depth),
                (784,),
                128,
                f"784-128x{depth}-10 tanh",
                num_steps=64,
            )
            for depth in (8, 32, 128)
        ),
        Workload(
            "gelu_mlp",
            partial(networks.mlp, (784, 128, 128, 128, 10), nn.GELU),
            (784,),
            512,
            "784-128x3-10 exact gelu",
            num_steps=64,
        ),
        Workload("mlp_600_incremental", networks.mlp_600, (784,), 300, _MLP, method="incremental", lr=1e-4),
        Workload("mlp_600_first", _mlp_600_first, (784,), 300, f"{_MLP}, beliefs before the activations"),
        Workload("mlp_600_b32", networks.mlp_600, (784,), 32, _MLP),
        Workload("mlp_600_b512", networks.mlp_600, (784,), 512, _MLP),
        Workload("mnist_cnn_fixed", networks.mnist_cnn, (1, 28, 28), 300, _CNN, method="fixed_prediction"),
        Workload(
            "vgg19",
            networks.vgg19,
            (3, 224, 224),
            2,
            "VGG-19",
            1000,
            "fixed_prediction",
            step_size=0.05,
            num_steps=500,
        ),
    )
}
