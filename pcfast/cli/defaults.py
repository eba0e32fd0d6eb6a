"""What the commands do where an option is not given: it depends on the data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """Defaults of one data set; the names are those of the options."""

    net: str
    widths: tuple[int, ...]  # hidden layers of --net mlp
    step_size: float
    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    compare_epochs: int  # --epochs of `pcfast compare`, which measures every step


# The settings of Rosenbaum (2022) for MNIST, and of the program Torch2PC's example.
_PAPER = Defaults(
    net="cnn", widths=(600, 600), step_size=0.1, optimizer="adam", lr=0.002, weight_decay=0.0, batch_size=300,
    epochs=2, compare_epochs=2,
)  # fmt: skip
_CIFAR = Defaults(
    net="cifar-cnn", widths=(600, 600), step_size=0.1, optimizer="adam", lr=0.0005, weight_decay=0.0,
    batch_size=256, epochs=2, compare_epochs=2,
)  # fmt: skip

DEFAULTS: dict[str, Defaults] = {
    # A relaxation is stable while step_size * (1 + |W|)^2 < 2, |W| the largest singular value of a hidden layer's
    # weights, and training makes weights grow. With step_size 0.1 the limit, 3.5, is passed within 20 epochs on
    # digits, and what was learned is lost. 0.05 has its limit at 5.3; some weight decay keeps the network below it.
    "digits": Defaults(
        net="mlp", widths=(128, 128), step_size=0.05, optimizer="adamw", lr=0.0005, weight_decay=0.3,
        batch_size=32, epochs=40, compare_epochs=10,
    ),
    "mnist": _PAPER,
    "fashion-mnist": _PAPER,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}  # fmt: skip
NUM_STEPS = 20
STEP_SIZE = 0.1  # for --model without --data
