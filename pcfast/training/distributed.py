"""A run on several processes: each learns its rows of every batch, and the updates are those of one process.

Process r of N takes rows r, r + N, ... of a batch of B rows, as torch's DistributedSampler deals them out, but no row
twice: where the last batch has fewer rows than there are processes, those without one learn a row with weight 0.
Losses are normalised by B, not by the rows of a process, so that strict relaxation moves the beliefs as one process
would; the updates are then added up, by DistributedDataParallel in the backward pass, or before every step of the
optimiser where the parameters move in every iteration.

What the run asks of the others goes through the interface of :class:`Alone`, which a single process has.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import ArgumentError, PcfastError
from ..losses import describe_loss
from ..problem.settings import Settings
from ..support import modes
from .checkpoints import checksum, flat

T = TypeVar("T")
_WORDS_OF_A_SETTING = 200  # of one that differs between processes


class Alone:
    """The one process of a run, which has nobody to ask."""

    rank, size = 0, 1
    leads = True  # writes files and progress

    def seed(self, *parts: int) -> int:
        """Of this process's random numbers; ``parts``: the run's seed, and what else tells the moment."""
        return parts[0]

    def rows(self, rows: Tensor) -> Tensor:
        """Of a batch, those that this process learns."""
        return rows

    def first_rows(self, count: int) -> slice:
        """As many rows as this process learns of a batch of ``count``, from the beginning of the data."""
        return slice(count)

    def counted(self, batch: Tensor) -> Tensor:
        """Of this process's rows of a batch, those that are not a stand-in."""
        return batch

    def dealt(self, batches: Sequence[T]) -> Sequence[T]:
        """Of batches that nothing is learned from, those that this process evaluates."""
        return batches

    def add_up(self, *totals: Tensor) -> None:
        """Each tensor becomes its sum over the processes."""

    def gathered(self, value: T) -> list[T]:
        """Every process's ``value``, by rank."""
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        """What ``make()`` gives on the process that leads, or raises there."""
        return make()

    def agreed(self) -> contextlib.AbstractContextManager[None]:
        """Where the block raises on one process it raises on all, which wait for each other at its end."""
        return contextlib.nullcontext()

    def check_rows(self, rows: int) -> None:
        """Raise ArgumentError where a batch of ``rows`` leaves a process without any."""

    def check_model(self, model: nn.Module) -> None:
        """Raise ArgumentError where the updates of parts of a batch do not add up to those of the whole."""

    def check_same(self, settings: dict, model: nn.Module) -> None:
        """Raise ArgumentError where another process has other settings or parameters."""

    def loss(self, loss_with: Callable, model: nn.Sequential, settings: Settings) -> Callable:
        """``loss_with``, for the rows of this process, in whose backward pass the updates are added up."""
        return loss_with

    def step(self, step_with: Callable) -> Callable:
        """``step_with``, for the rows of this process; the updates are added up before the optimiser reads them."""
        return step_with

    def stop(self, requested: Callable[[], bool]) -> Stop:
        """Whether the run is to stop, once any process was asked to."""
        return Stop(requested)


class Stop:
    """Whether a run is to stop: called before every batch; :meth:`now` where it has come to a rest."""

    def __init__(self, requested: Callable[[], bool]) -> None:
        self.requested = requested

    def __call__(self) -> bool:
        return self.requested()

    def now(self) -> bool:
        return self.requested()


ALONE = Alone()


def processes_of(group: dist.ProcessGroup | None) -> Alone:
    """Those of ``group``, or this one alone.

    Raises:
        ArgumentError: this process is not in the group.
    """
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        needed = "a process group that this process is in, e.g. torch.distributed.group.WORLD"
        given = "one of others" if isinstance(group, dist.ProcessGroup) else f"a {type(group).__name__}"
        raise ArgumentError(
            "process_group", given, needed, "Call torch.distributed.init_process_group first."
        )
    return Processes(group)


class Processes(Alone):
    """The processes of a torch.distributed group.

    ``control`` is a gloo group of the same processes: what they agree on lies on the host, whatever device trains.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.leads = self.rank == 0
        self.control = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        self._first = dist.get_global_rank(group, 0)
        self._batch, self._counts = 1, True  # rows of the batch at hand; whether this process has one of them

    def seed(self, *parts):
        if self.leads:
            return parts[0]
        return int(
            np.random.SeedSequence((*parts, self.rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)
        )

    def rows(self, rows):
        mine = rows[self.rank :: self.size]
        self._batch, self._counts = len(rows), len(mine) > 0
        return mine if self._counts else rows[:1]

    def first_rows(self, count):
        return slice(len(self.rows(torch.arange(count))))

    def counted(self, batch):
        return batch if self._counts else batch[:0]

    def dealt(self, batches):
        return batches[self.rank :: self.size]

    def add_up(self, *totals):
        for total in totals:
            dist.all_reduce(total, group=self.group)

    def gathered(self, value):
        result = [None] * self.size
        dist.all_gather_object(result, value, group=self.control)
        return result

    def first(self, make):
        made = error = None
        if self.leads:
            try:
                made = make()
            except Exception as raised:
                error = raised
        said = [(made, None if error is None else _portable(error))]
        dist.broadcast_object_list(said, src=self._first, group=self.control)
        value, of_first = said[0]
        if of_first is not None:
            raise _of_all(error or of_first)
        return made if self.leads else value

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        errors = self.gathered(None if error is None else _portable(error))
        rank = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if rank is None:
            return
        if rank == self.rank:
            raise _of_all(error)
        raise _of_all(errors[rank], rank) from error

    def check_rows(self, rows):
        if rows < self.size:
            needed = "at least one row a process in a full batch"
            remedy = "Use larger batches, or fewer processes."
            raise ArgumentError("batch_size", f"{rows} rows on {self.size} processes", needed, remedy)

    def check_model(self, model):
        if self.size == 1:
            return
        with modes.training(model):
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                    raise ArgumentError(
                        "model",
                        f"{type(module).__name__} at {name} in train mode, on {self.size} processes",
                        "layers that treat every row by itself: a process sees its rows of a batch alone",
                        "Take LayerNorm or GroupNorm, put that module in eval mode, or use one process.",
                    )

    def check_same(self, settings, model):
        state = {**model.state_dict(), **dict(model.named_parameters())}
        parts = {
            **{f"setting {key}": str(value)[:_WORDS_OF_A_SETTING] for key, value in flat(settings).items()},
            **{f"model {name}": checksum({name: tensor})[:16] for name, tensor in state.items()},
        }
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        if len(set(self.gathered(digest))) == 1:
            return
        every = self.gathered(parts)
        with self.agreed():
            for rank, there in enumerate(every):
                for key in {**every[0], **there}:
                    if every[0].get(key) != there.get(key):
                        given = (
                            f"{key.removeprefix('setting ')} = {there.get(key, 'absent')} on rank {rank}, "
                        )
                        given += f"{every[0].get(key, 'absent')} on rank 0"
                        needed = "the same model and settings on every process"
                        remedy = "Seed torch the same before the model is made; start every process alike."
                        raise ArgumentError("model", given, needed, remedy)

    def _normalised(self, settings: Settings) -> Settings:
        """``settings`` with the rows of the whole batch where the loss is a mean."""
        if self.size == 1:
            return settings
        if settings.reduction != "sum":
            return replace(settings, normalizer=self._batch)
        described = describe_loss(settings.loss)
        if described.known:
            return replace(settings, normalizer=self._batch) if described.settings[0] == "mean" else settings
        if getattr(settings.loss, "reduction", None) == "sum":
            return settings
        raise ArgumentError(
            "loss",
            f"{getattr(settings.loss, '__qualname__', type(settings.loss).__name__)} on {self.size} processes",
            "a loss that sums over the rows and says so in an attribute reduction = 'sum', or one known by name",
            "A mean over the rows of one process is not that over the batch.",
        )

    def loss(self, loss_with, model, settings):
        self._normalised(settings)  # raises
        parallel = DistributedDataParallel(
            _Loss(loss_with, model, settings.loss),
            process_group=self.group,
            static_graph=True,
            gradient_as_bucket_view=True,
        )
        parallel.register_comm_hook(self.group, added_up)

        def loss_of(settings, model, x, y, return_output):
            now = self._normalised(settings)
            if not torch.is_grad_enabled():
                return loss_with(now, model, x, y, return_output)
            value, output = parallel(now, x, y)
            return (value if self._counts else 0 * value), output

        return loss_of

    def step(self, step_with):
        def added(optimizer: Optimizer, *_) -> None:
            gradients = [
                p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            by_dtype = sorted(gradients, key=lambda g: str(g.dtype))
            for _, same in itertools.groupby(by_dtype, key=lambda g: g.dtype):
                same = list(same)
                total = torch.cat([g.reshape(-1) for g in same])
                if not self._counts:
                    total.zero_()
                dist.all_reduce(total, group=self.group)
                for gradient, part in zip(same, total.split([g.numel() for g in same]), strict=True):
                    gradient.copy_(part.view_as(gradient))

        def step_of(settings, model, x, y, optimizer, return_output=False):
            hook = optimizer.register_step_pre_hook(added)
            try:
                value, output = step_with(self._normalised(settings), model, x, y, optimizer, True)
            finally:
                hook.remove()
            return (value if self._counts else 0 * value), output

        return step_of

    def stop(self, requested):
        return _AgreedStop(requested, self.control)


class _Loss(nn.Module):
    """``loss_with`` as DistributedDataParallel takes it: a module that has the model's parameters, and the loss's."""

    def __init__(self, loss_with: Callable, model: nn.Module, loss) -> None:
        super().__init__()
        self.loss_with, self.model, self.loss = loss_with, model, loss

    def forward(self, settings: Settings, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss_with(settings, self.model, x, y, return_output=True)


def added_up(group: dist.ProcessGroup, bucket):  # without annotations that torch would compare as text
    """DistributedDataParallel's hook: the sum over the processes, where its default is the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class _AgreedStop(Stop):
    """All processes stop after the same batch.

    What is asked before one batch is answered before the next: the answer travels while the batch is computed.
    """

    def __init__(self, requested: Callable[[], bool], control: dist.ProcessGroup) -> None:
        super().__init__(requested)
        self._control, self._asked = control, None

    def __call__(self):
        if self._answer():
            return True
        self._ask()
        return False

    def now(self):
        answer = self._answer()
        self._ask()
        return self._answer() or answer

    def _ask(self) -> None:
        flag = torch.tensor(int(self.requested()))
        self._asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._control, async_op=True)

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        flag, work = self._asked
        self._asked = None
        work.wait()
        return bool(flag.item())


def _of_all(error: Exception, rank: int = 0) -> Exception:
    """``error``, marked as one that every process raises: rank 0 says it for all of them."""
    if rank:
        error.of_rank = rank
    error.of_all = True
    return error


def _portable(error: Exception) -> Exception:
    """``error``, or one that says the same and can be sent to another process."""
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # pickling calls anything
        sent = None
    if type(sent) is type(error) and str(sent) == str(error):
        return error
    return (
        RuntimeError(f"{type(error).__name__}: {error}")
        if not isinstance(error, PcfastError)
        else PcfastError(error)
    )
