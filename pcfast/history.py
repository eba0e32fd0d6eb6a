"""What a training run measured."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class History:
    """What was measured, one entry an epoch.

    train_loss and train_accuracy are means over the epoch's samples, each taken before the update of its
    batch; test_loss and test_accuracy are taken after the epoch. Losses are per sample (a sum loss is divided
    by the number of samples), accuracies in 0..1, seconds is the time of the updates alone.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of finished epochs."""
        return len(self.seconds)

    def append(self, **values: float) -> None:
        """Add one epoch; every field is given."""
        for column in fields(self):
            getattr(self, column.name).append(values[column.name])
