"""What a training run measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field


@dataclass
class History:
    """What was measured, one entry an epoch.

    train_loss, train_accuracy and train_r2 are taken over the epoch's samples, each before the update of its
    batch; test_loss, test_accuracy and test_r2 after the epoch. Losses are per sample (a sum loss is divided by the
    number of samples), accuracies in 0..1, seconds is the time of the updates alone. Where targets are values
    (regression) accuracies are NaN and R^2 takes their place; where they are classes there are no entries of R^2.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_r2: list[float] = field(default_factory=list)
    test_r2: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of finished epochs."""
        return len(self.seconds)

    @property
    def of_classes(self) -> bool:
        """Whether targets are classes."""
        return not self.test_r2

    @property
    def columns(self) -> dict[str, list[float]]:
        """Those that a table has: R^2 in the place of accuracies where targets are values."""
        left_out = "r2" if self.of_classes else "accuracy"
        return {name: column for name, column in asdict(self).items() if not name.endswith(left_out)}

    def append(self, **values: float) -> None:
        """Add one epoch; every field is given, those of R^2 for regression only, where there is no accuracy."""
        if "test_r2" in values:
            values = {"train_accuracy": math.nan, "test_accuracy": math.nan, **values}
        for name, column in vars(self).items():
            if name in values or not name.endswith("r2"):
                column.append(values[name])

    def score(self, part: str) -> str:
        """The last epoch's accuracy or R^2 of ``part``, "train" or "test", in words."""
        name = "accuracy" if self.of_classes else "r2"
        return score_text(self.of_classes, getattr(self, f"{part}_{name}")[-1])


def score_text(of_classes: bool, score: float) -> str:
    """An accuracy, or R^2, in words."""
    return f"accuracy {score:.2%}" if of_classes else f"R^2 {score:.4f}"
