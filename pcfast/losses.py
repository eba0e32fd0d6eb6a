"""Losses: what the relaxation needs of them is dLoss/dmu_L at moving predictions mu_L.

Cross-entropy and mean squared error (as modules, functions, ``functools.partial`` of the functions, or by
name) and :func:`half_squared_error` have it in closed form; any other callable is differentiated by torch autograd.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError, ArgumentTypeError, ShapeError
from .support import differentiation

LossLike = str | Callable[[Tensor, Tensor], Tensor]

#: What stands for the reduction in the settings of :func:`half_squared_error`, a mean squared error as any other.
HALF_SUM = "half_sum"


def half_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """0.5 |output - y|^2 summed over batch and units, 0-dim: a known loss, whose gradient is output - y."""
    return 0.5 * F.mse_loss(output, y, reduction="sum")


half_squared_error.reduction = "sum"  # as torch's modules say it, for who reports the loss of a sample

#: Stands for a sum of weights that is zero: what is divided by it is zero, too, and stays so.
_NO_WEIGHT = 1e-30

_NAMES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
_DEFAULTS = {
    function: {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for function in _NAMES.values()
}


@dataclass(frozen=True)
class PreparedTarget:
    """The target ``y`` made ready for one batch: what the closed forms read in every iteration.

    Attributes:
        target: cross-entropy: (B, C, ...) with loss = -sum(target * log_softmax(mu)); MSE: y itself.
        target_sum: cross-entropy: ``target`` summed over classes, (B, 1, ...).
        scale: MSE: factor of (mu - y).
        invalid_labels: 0-dim bool tensor, True where a label was out of range; None where that was checked at once.
    """

    target: Tensor
    target_sum: Tensor | None = None
    scale: float = 1.0
    invalid_labels: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A loss callable with its gradient.

    Attributes:
        kind: "cross_entropy", "mse" or "callable".
        settings: static settings of the known kinds, for plan keys.
        weight: class weights of cross-entropy, or None.
        function: the callable itself, ``function(output, y) -> 0-dim tensor``.
        normalizer: batch size to divide a mean loss by instead of the local one, or None.
    """

    kind: str
    settings: tuple
    function: Callable
    weight: Tensor | None = None
    normalizer: int | None = None

    @property
    def known(self) -> bool:
        return self.kind != "callable"

    def share(self, batch: int) -> float:
        """The local batch's share of the mean over the global batch."""
        return 1.0 if self.normalizer is None else batch / self.normalizer

    def value(self, output: Tensor, y) -> Tensor:
        """The loss at ``output`` (B, ...): 0-dim. A mean over labels that are all ignored is zero."""
        value = self.function(output, self._as_trained(output, y) if self.known else y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            if not isinstance(value, Tensor):
                given, remedy = f"a {type(value).__name__} as its value", "Return a tensor, without .item()."
            else:
                given = f"a value of shape {tuple(value.shape)}"
                remedy = 'Use reduction="mean" or "sum", not "none".'
            raise ArgumentError("loss", given, "a scalar tensor", remedy)
        value = value.reshape(())
        if value.is_complex():
            raise ArgumentError(
                "loss", "a complex value", "a real scalar", "E.g. (output - y).abs().square().sum()."
            )
        if self.kind == "cross_entropy" and self.settings[0] == "mean" and not y.is_floating_point():
            value = torch.where((y != self.settings[1]).any(), value, torch.zeros_like(value))
        return value if self.normalizer is None else value * self.share(output.shape[0])

    def _as_trained(self, output: Tensor, y: Tensor) -> Tensor:
        """``y`` in the dtype in which :meth:`prepare` takes it, so that what trains also evaluates."""
        if not y.is_floating_point():
            return y.long()
        return y if y.dtype == output.dtype else y.to(output.dtype)

    def gradient_by_autograd(self, output: Tensor, y) -> Tensor:
        """dLoss/doutput by torch autograd, for any loss; shape and dtype of ``output``."""
        return self.gradients_by_autograd(output, y, parameters=False)[0]

    def gradients_by_autograd(
        self, output: Tensor, y, *, parameters: bool = True
    ) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
        """As :meth:`gradient_by_autograd`, and (p, dLoss/dp) of the parameters that the loss itself uses."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_(True)
            value, used, gradient, result = self.value(leaf, y), [], None, ()
            if value.requires_grad:
                used = differentiation.trained(value, apart=[leaf]) if parameters else []
                gradient, *result = differentiation.gradients(value, [leaf, *used], keep=bool(used))
        if gradient is None:
            raise ArgumentError(
                "loss", "a value that does not depend on the model's output", "a differentiable loss"
            )
        return gradient, [(p, g) for p, g in zip(used, result, strict=True) if g is not None]

    def check_target(self, output_shape: tuple[int, ...], y) -> None:
        """Check type, shape and dtype of ``y`` for a known loss; labels' range is checked in :meth:`prepare`.

        Raises:
            ArgumentTypeError, ShapeError: naming y, what was given and what is needed.
        """
        if not self.known:
            return
        if not isinstance(y, Tensor):
            raise ArgumentTypeError("y", f"a {type(y).__name__}", "a torch.Tensor")
        if y.is_nested or y.layout != torch.strided:
            raise ArgumentTypeError("y", "a nested or sparse tensor", "a dense tensor")
        if y.is_complex():
            raise ArgumentTypeError(
                "y",
                f"dtype {y.dtype}",
                f"real values for {self.kind}",
                "Pass a loss of your own to train on y.",
            )
        classes = output_shape[1] if len(output_shape) > 1 else 0
        if self.weight is not None and (
            tuple(self.weight.shape) != (classes,) or self.weight.device != y.device
        ):
            raise ArgumentError(
                "loss",
                f"class weights of shape {tuple(self.weight.shape)} on {self.weight.device}",
                f"shape ({classes},) on {y.device}, one for each of the output's classes",
            )
        if self.kind == "mse":
            if tuple(y.shape) != output_shape:
                raise ShapeError("y", f"shape {tuple(y.shape)}", f"the output's shape {output_shape} for mse")
            if not y.is_floating_point():
                raise ArgumentTypeError(
                    "y", f"dtype {y.dtype}", "a floating dtype for mse", "Call y.to(x.dtype)."
                )
            return
        if y.is_floating_point():
            if tuple(y.shape) != output_shape:
                raise ShapeError(
                    "y",
                    f"class probabilities of shape {tuple(y.shape)}",
                    f"the output's shape {output_shape}",
                    "For class indices use an int64 tensor of shape (batch,).",
                )
            return
        if y.dtype not in (torch.int64, torch.uint8):
            raise ArgumentTypeError(
                "y", f"dtype {y.dtype}", "int64 class indices or floating class probabilities", "y.long()"
            )
        labels_shape = (output_shape[0], *output_shape[2:])
        if len(output_shape) < 2 or tuple(y.shape) != labels_shape:
            raise ShapeError(
                "y",
                f"labels of shape {tuple(y.shape)}",
                f"{labels_shape} for an output of shape {output_shape}",
                "One-hot labels: y.argmax(1), or y.float() as class probabilities."
                if tuple(y.shape) == output_shape
                else "One label a row of x.",
            )

    def prepare(self, output: Tensor, y: Tensor, *, raise_now: bool) -> PreparedTarget:
        """Make ``y`` ready for :meth:`gradient` at outputs like ``output`` (B, C, ...).

        With ``raise_now`` labels out of range raise ArgumentError at once (this waits for the device);
        otherwise the returned target's ``invalid_labels`` says so on the device and the labels are clamped.
        """
        batch = output.shape[0]
        if self.kind == "mse":
            return PreparedTarget(target=y.to(output.dtype), scale=self.mse_scale(y))
        reduction, ignore_index, smoothing = self.settings
        classes = output.shape[1]
        weight = None if self.weight is None else self.weight.to(output.dtype)
        per_class = None if weight is None else weight.view(1, -1, *[1] * (output.dim() - 2))
        invalid_labels = None
        if y.is_floating_point():
            target = y.to(output.dtype) * (1 - smoothing) + smoothing / classes
            if per_class is not None:
                target = target * per_class
            count: Tensor | float = float(output.numel() // classes)
        else:
            labels = y.long()
            valid = labels != ignore_index
            possible = labels.clamp(0, classes - 1)
            wrong = (valid & (possible != labels)).any()
            if self.normalizer is not None:  # ignored rows would make the mean one over fewer rows
                wrong = wrong | ~valid.all()
            if not raise_now:
                invalid_labels = wrong
            elif wrong:
                raise ArgumentError(
                    "y",
                    f"labels from {int(labels.min())} to {int(labels.max())}",
                    f"labels from 0 to {classes - 1} for {classes} classes",
                )
            keep = valid.to(output.dtype)
            own = keep if weight is None else keep * weight[possible]
            named = own * (1 - smoothing) if smoothing else own
            target = torch.zeros_like(output).scatter_(1, possible.unsqueeze(1), named.unsqueeze(1))
            if smoothing:
                spread = torch.ones_like(output) if per_class is None else per_class
                target = target + keep.unsqueeze(1) * spread * (smoothing / classes)
            count = own.sum()
        if reduction == "mean":
            if isinstance(count, Tensor):
                count = count.clamp_min(
                    _NO_WEIGHT
                )  # where no label counts target is zero, and so is the loss
            target = target * (self.share(batch) / count)
        return PreparedTarget(
            target=target, target_sum=target.sum(1, keepdim=True), invalid_labels=invalid_labels
        )

    def mse_scale(self, y: Tensor) -> float:
        """The factor of (mu - y) in the gradient of mse."""
        (reduction,) = self.settings
        if reduction == HALF_SUM:
            return 1.0
        count = y.numel() if reduction == "mean" else 1
        return 2.0 / max(count, 1) * self.share(y.shape[0])

    def value_prepared(self, prepared: PreparedTarget, mu: Tensor) -> Tensor:
        """The loss at ``mu`` (B, C, ...) in closed form: 0-dim. Safe where labels were out of range."""
        if self.kind == "mse":
            return (mu - prepared.target).square().sum() * (prepared.scale / 2)
        log_p = torch.log_softmax(mu, 1)
        # a class of probability 0 that the target does not name costs nothing
        return -torch.where(prepared.target == 0, 0.0, prepared.target * log_p).sum()

    def gradient(self, prepared: PreparedTarget, mu: Tensor) -> Tensor:
        """dLoss/dmu in closed form at predictions ``mu`` (B, C, ...), same shape and dtype."""
        if self.kind == "mse":
            return (mu - prepared.target) * prepared.scale
        return _softmax(mu).mul_(prepared.target_sum).sub_(prepared.target)


#: Fewer classes than this fill no vector of a CPU, where torch's softmax over the rows of 10 classes takes five times
#: as long as over columns.
_FEW_CLASSES = 16


def _softmax(mu: Tensor) -> Tensor:
    """Softmax over dim 1."""
    if mu.is_cpu and mu.dim() == 2 and mu.shape[1] < _FEW_CLASSES:
        return torch.softmax(mu.t(), 0).t()
    return torch.softmax(mu, 1)


def _plain(loss: nn.Module) -> bool:
    hooks = loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or loss._backward_pre_hooks
    return not hooks and "forward" not in loss.__dict__


def _known_settings(loss) -> tuple[str, tuple, Tensor | None] | None:
    """(kind, settings, class weights) of a loss that has a closed form, else None."""
    if loss is half_squared_error:
        return "mse", (HALF_SUM,), None
    if type(loss) is nn.CrossEntropyLoss and _plain(loss):
        arguments = {
            name: getattr(loss, name) for name in ("weight", "ignore_index", "reduction", "label_smoothing")
        }
        function = F.cross_entropy
    elif type(loss) is nn.MSELoss and _plain(loss):
        arguments, function = {"reduction": loss.reduction}, F.mse_loss
    elif isinstance(loss, functools.partial) and loss.func in (F.cross_entropy, F.mse_loss) and not loss.args:
        arguments, function = dict(loss.keywords), loss.func
    elif loss in (F.cross_entropy, F.mse_loss):
        arguments, function = {}, loss
    else:
        return None
    defaults = _DEFAULTS[function]
    deprecated = ("size_average", "reduce")
    if set(arguments) - set(defaults) or any(arguments.get(name) is not None for name in deprecated):
        return None
    arguments = {**defaults, **arguments}
    if arguments["reduction"] not in ("mean", "sum"):
        return None
    if function is F.cross_entropy:
        if arguments["weight"] is not None and arguments["weight"].requires_grad:
            return None  # class weights that are trained: torch differentiates them
        settings = (arguments["reduction"], arguments["ignore_index"], arguments["label_smoothing"])
        return "cross_entropy", settings, arguments["weight"]
    return None if arguments["weight"] is not None else ("mse", (arguments["reduction"],), None)


def describe_loss(loss: LossLike, normalizer: int | None = None) -> Loss:
    """Describe ``loss``.

    Args:
        loss: "cross_entropy", "mse", or a callable ``loss(output, y) -> scalar``.
        normalizer: for mean losses of a known kind, the number of rows to average over instead of the local
            batch (the global batch when it is sharded or cut into micro-batches).

    Raises:
        ArgumentTypeError, ArgumentError: naming the argument.
    """
    if isinstance(loss, str):
        if loss not in _NAMES:
            raise ArgumentError("loss", repr(loss), f"one of {sorted(_NAMES)} or a callable loss(output, y)")
        loss = _NAMES[loss]
    elif isinstance(loss, type):
        raise ArgumentTypeError("loss", f"the class {loss.__name__}", "a callable loss(output, y)", "Add ().")
    elif not callable(loss):
        raise ArgumentTypeError("loss", f"a {type(loss).__name__}", "a name or a callable loss(output, y)")
    known = _known_settings(loss)
    if normalizer is not None:
        if isinstance(normalizer, bool) or not isinstance(normalizer, int) or normalizer < 1:
            raise ArgumentError("normalizer", repr(normalizer), "a positive int: rows of the global batch")
        if known is None or known[1][0] != "mean":
            raise ArgumentError(
                "normalizer",
                f"{normalizer} with loss {f'{known[0]} ({known[1][0]})' if known else type(loss).__name__}",
                "a cross-entropy or mse loss with reduction='mean'",
                "A sum loss needs no normalizer; scale a loss of your own inside it.",
            )
        if known[2] is not None or (known[0] == "cross_entropy" and known[1][1] >= 0):
            raise ArgumentError(
                "normalizer",
                f"{normalizer} with class weights or an ignore_index",
                "a mean over rows, which this loss is not",
                "Use reduction='sum' and scale by the global weight yourself.",
            )
    if known is not None and known[0] == "cross_entropy" and not 0 <= known[1][2] <= 1:
        raise ArgumentError("loss", f"label_smoothing={known[1][2]}", "label_smoothing between 0 and 1")
    if known is None:
        return Loss("callable", (id(loss),), loss, None, normalizer)
    return Loss(known[0], known[1], loss, known[2], normalizer)
