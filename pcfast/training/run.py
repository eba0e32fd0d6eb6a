"""The state of a training run: what a checkpoint holds, the update of one batch, and evaluation."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import incremental
from ..datasets import Data
from ..losses import LossLike, describe_loss
from ..problem import reductions
from ..problem.status import synchronize
from ..support import modes
from . import scores
from .checkpoints import FORMAT, check_state, checksum, unfit, unfit_where_refused
from .distributed import ALONE, Alone
from .history import History
from .scores import hits


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: LossLike = F.cross_entropy, batch_size: int = 1024
) -> tuple[float, float]:
    """(loss per sample, score) of ``model`` in eval mode, over batches; every part's mode is as before.

    The score is the accuracy in 0..1 where ``y`` are class indices (N,) or class probabilities (N, C); for other
    values, regression, it is R^2 = 1 - sum |output - y|^2 / sum |y - mean(y)|^2.

    x: (N, ...), on the model's device as ``y``.
    """
    return _evaluated(model, x, y, loss, batch_size, scores.are_classes(y, loss))


def _evaluated(
    model,
    x: Tensor,
    y: Tensor,
    loss,
    batch_size: int,
    of_classes: bool,
    processes: Alone = ALONE,
    predict=None,
) -> tuple[float, float]:
    described = describe_loss(loss)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    score = torch.zeros((), dtype=torch.float64, device=x.device)
    with modes.evaluating(model), torch.no_grad():
        batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        for x_batch, y_batch in processes.dealt(batches):
            output = model(x_batch) if predict is None else predict(x_batch, y_batch)
            value = described.value(output, y_batch)
            total += value if _sums(loss) else value * len(x_batch)
            score += hits(output, y_batch) if of_classes else scores.residual(output, y_batch)
        processes.add_up(total, score)
        if not of_classes:
            return total.item() / len(x), scores.r2(score.item(), scores.spread(y).item())
    return total.item() / len(x), score.item() / len(x)


class TrainingRun:
    """The state of a training run: what a checkpoint holds, and the update of one batch."""

    def __init__(
        self, model, optimizer, data, loss, update, batch_size, seed, device, *, schedule=None, augment=None,
        samples=None, reduction="sum", processes=ALONE, predict=None,
    ):  # fmt: skip
        self.processes = processes
        self.predict = predict  # outputs from inputs and targets, of a network that reconstructs
        self.model, self.optimizer, self.schedule, self.loss = model, optimizer, schedule, loss
        self.sums = _sums(loss) and not reductions.REDUCTIONS[reduction][1]  # what ``update`` says is a sum
        self.update, self.augment = update, augment
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.samples = len(data.x_train) if samples is None else samples  # of one epoch
        self.data = Data(*(tensor.to(device) for tensor in data))
        self.history = History()
        self.position = 0  # samples of the running epoch that are done
        self.seen = 0  # those of them that the totals below are of: on several processes, of this one's rows
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.of_classes = scores.are_classes(data.y_train, loss) and scores.are_classes(data.y_test, loss)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)  # rows, where targets are classes
        self.residual = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # sum of squares, where they are values
        self.variance = (
            math.nan if self.of_classes else scores.spread(data.y_train).item() / len(data.y_train)
        )
        self.seconds = 0.0

    def train_epoch(self, stop: Callable[[], bool], after_batch: Callable[[int], None]) -> None:
        """Go on from ``position`` to the end of the epoch, or to the first batch after which ``stop()``."""
        order = np.random.default_rng((self.seed, len(self.history))).permutation(len(self.data.x_train))
        order = torch.from_numpy(order).to(self.device)
        with modes.training(self.model):
            self._train_batches(order, stop, after_batch)
        self.processes.add_up(self.loss_sum, self.correct, self.residual)
        self.seen = self.position

    def _train_batches(
        self, order: Tensor, stop: Callable[[], bool], after_batch: Callable[[int], None]
    ) -> None:
        start, before = time.perf_counter(), self.seconds
        while self.position < self.samples and not stop():
            rows = order[self.position : self.position + self.batch_size]
            mine = self.processes.rows(rows)
            x, y = self.inputs(mine), self.data.y_train[mine]
            loss, output = self.learn(x, y)
            torch.clear_autocast_cache()  # under autocast for the whole run it would keep the weights of before
            with torch.no_grad():
                self.loss_sum += loss if self.sums else loss * len(rows)
                output, y = self.processes.counted(output), self.processes.counted(y)
                if self.of_classes:
                    self.correct += hits(output, y)
                else:
                    self.residual += scores.residual(output, y)
            self.position += len(rows)
            self.seen += len(y)
            self.seconds = before + time.perf_counter() - start
            after_batch(len(rows))
        synchronize()  # on CUDA a divergence is known only now; it must not reach the checkpoint
        self.seconds = before + time.perf_counter() - start

    def inputs(self, rows) -> Tensor:
        """Rows of the training part as they are learned."""
        x = self.data.x_train[rows]
        return x if self.augment is None else self.augment(x)

    def learn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move the parameters by one batch: loss and output of its forward pass."""
        self.optimizer.zero_grad()
        loss, output = self.update(x, y)
        loss.backward()
        self.optimizer.step()
        return loss, output

    def rehearse(self, x: Tensor, y: Tensor) -> None:
        """Raise what does not fit; no parameter moves."""
        with torch.no_grad():
            self.update(x, y)

    def score(self) -> float:
        """Accuracy, or R^2 where targets are values, of the running epoch so far."""
        if self.of_classes:
            return self.correct.item() / self.seen
        return scores.r2(self.residual.item() / self.seen, self.variance)

    def finish_epoch(self) -> None:
        """Evaluate, log, and get ready for the next epoch."""
        test_loss, test_score = _evaluated(
            self.model, self.data.x_test, self.data.y_test, self.loss, self.batch_size, self.of_classes,
            self.processes, self.predict,
        )  # fmt: skip
        name = "accuracy" if self.of_classes else "r2"
        self.history.append(
            train_loss=self.loss_sum.item() / self.samples,
            test_loss=test_loss,
            seconds=self.seconds,
            **{f"train_{name}": self.score(), f"test_{name}": test_score},
        )
        self.position, self.seen, self.seconds = 0, 0, 0.0
        for total in (self.loss_sum, self.correct, self.residual):
            total.zero_()

    def random_state(self) -> dict:
        """Torch's, as a checkpoint holds it: this process's, and in the key "others" that of the others."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        state, *others = self.processes.gathered({"cpu": torch.get_rng_state(), "cuda": cuda})
        return {**state, "others": others} if others else state

    def _restore_random_state(self, saved: dict, position: int, epoch: int) -> None:
        """This process's own; a new one where another number of processes wrote the checkpoint."""
        others, rank = saved.get("others", []), self.processes.rank
        if rank and len(others) + 1 != self.processes.size:
            torch.manual_seed(self.processes.seed(self.seed, epoch, position))
            return
        state = others[rank - 1] if rank else saved
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][0], self.device)

    def checkpoint(self, config: dict, random_state: dict) -> dict:
        """Everything that :meth:`restore` needs, in types that weights_only loading accepts, and a checksum of it."""
        parts = {
            "format": FORMAT,
            "config": config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.schedule is None else self.schedule.state_dict(),
            "epoch": len(self.history),
            "position": self.position,
            "loss_sum": self.loss_sum.item(),
            "correct": self.correct.item(),
            "residual": self.residual.item(),
            "seconds": self.seconds,
            "rng": random_state,
            "history": asdict(self.history),
        }
        return {**parts, "checksum": checksum(parts)}

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Take everything from the checkpoint read from ``path``.

        Raises:
            ArgumentError: naming the file and the part of it that does not fit.
        """
        position = checkpoint["position"]
        if position > self.samples or (position % self.batch_size and position != self.samples):
            of = f"an epoch of {self.samples} samples in batches of {self.batch_size}"
            raise unfit(path, "out", f"position {position} in {of}")
        check_state(path, "out", self.model, checkpoint["model"])
        with unfit_where_refused(path, "out", "rng"):
            self._restore_random_state(checkpoint["rng"], position, checkpoint["epoch"])
        with unfit_where_refused(path, "out", "optimizer"):
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.schedule is not None:
            with unfit_where_refused(path, "out", "scheduler"):
                self.schedule.load_state_dict(checkpoint["scheduler"])
        with unfit_where_refused(path, "out", "model"):
            self.model.load_state_dict(checkpoint["model"])
        self.position, self.seconds = position, checkpoint["seconds"]
        if self.processes.leads:  # the totals are added up at the end
            self.seen = position
            self.loss_sum.fill_(checkpoint["loss_sum"])
            self.correct.fill_(checkpoint["correct"])
            self.residual.fill_(checkpoint["residual"])
        self.history = History(**checkpoint["history"])
        if not self.of_classes and self.history.of_classes:  # of a format that did not measure it
            unknown = [math.nan] * len(self.history)
            self.history.train_r2, self.history.test_r2 = unknown, [*unknown]


class IncrementalRun(TrainingRun):
    """As :class:`TrainingRun`; ``update`` moves the parameters itself, in every iteration."""

    def learn(self, x, y):
        return self.update(x, y, return_output=True)

    def rehearse(self, x, y):
        incremental.rehearse(*self.update.args, x, y, **self.update.keywords)


def _sums(loss: LossLike) -> bool:
    """Whether ``loss`` sums over the batch, as far as it says so; only the logged numbers depend on it."""
    if isinstance(loss, functools.partial):
        return loss.keywords.get("reduction") == "sum"
    return getattr(loss, "reduction", "mean") == "sum"
