"""pc_loss inside torch.compile: one opaque operator for a whole predictive-coding step.

:func:`pc_loss` here is what the compiler traces instead of :func:`pcfast.pc_loss`. It puts one node into the graph,
``torch.ops.pcfast.step``: forward pass, relaxation and updates, run as in an eager call. The tensors that the step
reads (batch, parameters, buffers, class weights) are the operator's inputs, so it follows whatever the graph has
done to them; the model itself is no tensor and is named by a key of :data:`MODELS`.

Eager calls never come here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import threading
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autograd, incremental
from .backends import BACKENDS
from .backends.choice import requested
from .errors import ModelError, PcfastError
from .losses import HALF_SUM, describe_loss, half_squared_error
from .model.describe import describe
from .model.placement import common_placement
from .model.spec import Network
from .precision import choose_precision
from .problem import validation
from .problem.plan import canonical
from .problem.settings import Settings
from .relaxation.solve import forward_loss, solve
from .support.naming import module_text

# Models by key --------------------------------------------------------------------------------------------------


class Models:
    """Models by key, held weakly: an entry goes with its model. Safe to use from several threads."""

    def __init__(self) -> None:
        self._models: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._models)

    def key(self, model: nn.Module) -> str:
        """The key of ``model``, the same for as long as its structure stays.

        A number, and a digest of the structure: compiled graphs are cached on disk with the key in them, and must
        not be taken for those of another network that has the same number in another process.
        """
        digest = hashlib.sha256(module_text(model).encode()).hexdigest()[:16]
        with self._lock:
            for key, known in self._models.items():
                if known is model and key.endswith(digest):
                    return key
            key = f"{next(self._numbers)}-{digest}"
            self._models[key] = model
            return key

    def __getitem__(self, key: str) -> nn.Module:
        """The model of a key; RuntimeError where it is gone, or was never registered in this process."""
        with self._lock:
            model = self._models.get(key)
        if model is None:
            raise RuntimeError(
                f"pcfast::step: no model {key} in this process. Trace the function again (torch.compiler.reset())."
            )
        return model


MODELS = Models()


@torch.compiler.assume_constant_result
def _key(address: int) -> str:
    """The key of the model at ``address``, while tracing.

    The compiler hands no module to a function that it does not trace, only ``id(module)``, guarded. The frame that
    is being traced holds the model, so its address is good.
    """
    return MODELS.key(ctypes.cast(address, ctypes.py_object).value)


# The operator ---------------------------------------------------------------------------------------------------


def _moving_buffers(model: nn.Module) -> list[Tensor] | None:
    """The buffers that a step moves; None where that is not known: a module other than a norm has buffers."""
    moving: list[Tensor] = []
    for module in model.modules():
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
        if not buffers:
            continue
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            return None
        if module.training and module.track_running_stats:
            moving += buffers
    return moving


@contextlib.contextmanager
def reenable_autograd():
    """Autograd works in here. An operator runs below it, and modules that pcfast does not know need it."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        yield


def _ambient(device: torch.device, dtype: torch.dtype | None):
    """The autocast that was on where the step was traced; compiled graphs run with it switched off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextlib.contextmanager
def swap_parameters(own: list[Tensor], given: list[Tensor]):
    """The model's tensors have the values ``given``. They have them already, unless the graph has changed them.

    Values are written past the version counters and put back: autograd graphs may hold the tensors.
    """
    changed = [(o, g) for o, g in zip(own, given, strict=True) if o.data_ptr() != g.data_ptr()]
    kept = [(o, o.detach().clone()) for o, _ in changed]
    try:
        for o, g in changed:
            o.data.copy_(g)
        yield
    finally:
        for o, value in kept:
            o.data.copy_(value)


def _loss_function(
    kind: str, reduction: str, ignore_index: int, label_smoothing: float, weight: Tensor | None
):
    if reduction == HALF_SUM:
        return half_squared_error
    if kind == "mse":
        return functools.partial(F.mse_loss, reduction=reduction)
    return functools.partial(
        F.cross_entropy,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _not_in_use(parameter: Tensor) -> Tensor:
    """Stands for the update of a parameter that nothing uses: empty, with one dimension more."""
    return parameter.new_empty((0,) * (parameter.dim() + 1))


def _laid_out(update: Tensor, parameter: Tensor) -> Tensor:
    """``update`` with the strides of ``torch.empty_like(parameter)``, as the abstract step has it."""
    if parameter.is_contiguous():
        return update.contiguous()
    return torch.empty_like(parameter).copy_(update)


def dealias(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
    """``tensors``, cloned where two share memory or one lies in ``x``: an operator's outputs may not."""
    seen, result = {x.untyped_storage().data_ptr()}, []
    for tensor in tensors:
        memory = tensor.untyped_storage().data_ptr()
        result.append(tensor.clone() if memory in seen and tensor.numel() else tensor)
        seen.add(memory)
    return result


_PARAMETERS = 2  # the place of ``parameters`` among the arguments of step


@torch.library.custom_op(
    "pcfast::step",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor y, Tensor[] parameters, Tensor[] buffers, Tensor? class_weights, Tensor[] beliefs, "
        "str given, Tensor fresh, str model, str kind, str reduction, SymInt ignore_index, float label_smoothing, "
        "SymInt? normalizer, str method, float step_size, SymInt num_steps, str backend, str check, "
        "ScalarType? autocast, bool train) -> (Tensor, Tensor, Tensor[], Tensor[])"
    ),
    # seeded: it may draw dropout masks. Unsafe: it has CUDA graphs of its own, and reports to the host.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def step(
    x, y, parameters, buffers, class_weights, beliefs, given, fresh, model, kind, reduction, ignore_index,
    label_smoothing, normalizer, method, step_size, num_steps, backend, check, autocast, train,
):  # fmt: skip
    """One predictive-coding step. Its loss is differentiable in the parameters, once.

    Args:
        x, y: the batch.
        parameters, buffers: the values of all of the model's, in its order.
        class_weights: of cross-entropy, or None.
        beliefs, given: the tensors in vinit, and a "1" for each among a "0" for each None; both empty without it.
        fresh: an empty tensor made for this call. Nobody reads it; it keeps compilers from taking two equal calls
            for one, since each draws dropout masks of its own.
        model: key of :data:`MODELS`.
        kind, reduction, ignore_index, label_smoothing: of the loss, as in :class:`pcfast.losses.Loss`.
        normalizer, method, step_size, num_steps, backend, check: as for :func:`pcfast.pc_loss`.
        autocast: dtype of the ambient autocast, or None.
        train: False for the forward loss alone.

    Returns:
        The loss, 0-dim. The output vhat_L, contiguous. With ``train`` one update for each parameter that requires
        grad, laid out like it (one dimension more and empty where the parameter is not in use). The new values of
        the buffers that move; the model's own stay as they are.

    Raises:
        As :func:`pcfast.pc_loss`. ModelError for parameters that layers use and the model does not register: the
        operator could not deliver their updates.
    """
    owner = MODELS[model]
    remaining = iter(beliefs)
    vinit = [next(remaining) if mark == "1" else None for mark in given] or None
    settings = Settings(
        _loss_function(kind, reduction, ignore_index, label_smoothing, class_weights), method, step_size, num_steps,
        backend=backend, vinit=vinit, normalizer=normalizer, check=check,
    )  # fmt: skip
    own = [*owner.parameters(), *owner.buffers()]
    with reenable_autograd(), _ambient(x.device, autocast), swap_parameters(own, [*parameters, *buffers]):
        moving = _moving_buffers(owner)
        before = [buffer.clone() for buffer in moving]
        if train:
            validation.check_trainable(owner)
            outcome, _ = solve(owner, x, y, settings)
            loss, output, result = outcome.loss, outcome.output, outcome.gradients
            if not result.keys() <= set(owner.parameters()):
                raise ModelError(
                    "model",
                    "layers that use parameters which the model does not register",
                    "registered ones inside torch.compile",
                    "Register them, or call pc_loss outside of compiled functions.",
                )
            updates = [
                _laid_out(result[parameter], parameter) if parameter in result else _not_in_use(parameter)
                for parameter in owner.parameters()
                if parameter.requires_grad
            ]
        else:
            with torch.no_grad():
                loss, output = forward_loss(owner, x, y, settings)
            updates = []
        moved = [buffer.clone() for buffer in moving]
        for buffer, value in zip(moving, before, strict=True):
            buffer.data.copy_(value)
    loss, output, *updates = dealias([loss, output.contiguous(), *updates], x)
    return loss, output, updates, moved


@step.register_fake
def _abstract_step(
    x, y, parameters, buffers, class_weights, beliefs, given, fresh, model, kind, reduction, ignore_index,
    label_smoothing, normalizer, method, step_size, num_steps, backend, check, autocast, train,
):  # fmt: skip
    """Shapes, dtypes and devices of what :func:`step` returns, without relaxing anything."""
    owner = MODELS[model]
    loss = describe_loss(_loss_function(kind, reduction, ignore_index, label_smoothing, class_weights))
    values = dict(zip([*owner.parameters(), *owner.buffers()], [*parameters, *buffers], strict=True))
    used: set[nn.Parameter] = set()
    with reenable_autograd(), _ambient(x.device, autocast):
        try:
            network = describe(owner)
            dtype = validation.check_input(x, network, common_placement(owner))
            network.shapes(tuple(x.shape))
            output, used = _abstract_forward(owner, network, x.to(dtype) if train else x, values)
            loss.check_target(tuple(output.shape), y)
            if train:
                output = output.to(choose_precision(x.device.type, dtype).state)
                value = output.new_empty(())
            else:
                value = loss.value(output, y)
        except PcfastError:  # the step raises it where an eager call does; until then any shapes will do
            output, value = x.new_empty((*x.shape[:1], 1)), x.new_empty(())
    updates = [
        torch.empty_like(values[parameter]) if parameter in used else _not_in_use(values[parameter])
        for parameter in owner.parameters()
        if parameter.requires_grad and train
    ]
    moved = [torch.empty_like(values[buffer]) for buffer in _moving_buffers(owner)]
    return value.new_empty(()), output.new_empty(output.shape), updates, moved


def _abstract_forward(
    model: nn.Sequential, network: Network, x: Tensor, values: dict[Tensor, Tensor]
) -> tuple[Tensor, set[nn.Parameter]]:
    """The forward pass on tensors without values: its output, and the trained parameters that operations use.

    Args:
        values: parameter or buffer of the model -> what stands for it.
    """
    used, v = set(), x
    for op in (op for layer in network.layers for op in layer.ops):
        module = model.get_submodule(op.path)
        trained = {p: values[p].detach().requires_grad_() for p in module.parameters() if p.requires_grad}
        tensors = {
            name: trained[tensor] if tensor in trained else values[tensor].detach().clone()
            for name, tensor in itertools.chain(
                module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
            )
        }
        with torch.enable_grad():
            v = torch.func.functional_call(module, tensors, (v.detach().clone(),))
            gradients = [None] * len(trained)
            if trained and v.requires_grad:
                gradients = torch.autograd.grad(v.sum(), list(trained.values()), allow_unused=True)
        used |= {p for p, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    return v.detach(), used


def _keep_updates(ctx, inputs, output) -> None:
    _, vhat, updates, moved = output
    ctx.mark_non_differentiable(vhat, *updates, *moved)
    remaining, used = iter(updates), []
    ctx.gradients = [[None] * len(value) if isinstance(value, list | tuple) else None for value in inputs]
    ctx.used = []
    for index, parameter in enumerate(inputs[_PARAMETERS]):
        update = next(remaining) if parameter.requires_grad else None
        if update is not None and update.dim() == parameter.dim():
            ctx.used.append(index)
            used.append(update)
    ctx.save_for_backward(*used)


def _backward(ctx, grad_loss, *_):
    """The updates times ``grad_loss``, for the parameters in use that require grad."""
    gradients = [None if entry is None else list(entry) for entry in ctx.gradients]
    for index, update in zip(ctx.used, autograd.scaled(ctx.saved_tensors, grad_loss), strict=True):
        gradients[_PARAMETERS][index] = update
    return tuple(gradients)


step.register_autograd(_backward, setup_context=_keep_updates)


# What the compiler traces ---------------------------------------------------------------------------------------

_outside = torch.compiler.disable(
    autograd.loss_with,
    reason="this call of pc_loss runs outside the graph: docs/behaviour.md, torch.compile, says which calls do",
)


incremental_step = torch.compiler.disable(
    incremental.step_with,
    reason="incremental_step moves the parameters with an optimiser between iterations: it runs outside the graph",
)


#: Losses whose settings the operator's arguments can say.
_KINDS = ("cross_entropy", "mse")


@torch.compiler.assume_constant_result
def _literal(name: str) -> bool:
    """Whether the literal loop is asked for, by a call or by the environment, which no compiler traces."""
    backend = BACKENDS.get(requested(name))
    return backend is not None and backend.literal


def _fits(model, x, y, settings: Settings, clamp) -> bool:
    """Whether the operator's arguments can say what the call says. An eager call says what is wrong with others."""
    if not isinstance(model, nn.Sequential) or not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    if not x.is_floating_point() or x.layout != torch.strided:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    if any(type(word) is not str for word in (settings.method, settings.backend, settings.check)):
        return False
    if type(settings.step_size) not in (float, int) or type(settings.num_steps) is not int:
        return False
    if settings.normalizer is not None and type(settings.normalizer) is not int:
        return False
    others = (
        settings.belief_optimizer, settings.nudging, settings.tolerance, settings.precision, settings.noise, clamp,
    )  # fmt: skip
    if any(setting is not None for setting in others):
        return False
    if settings.reduction != "sum" or settings.update_scale != 1:
        return False
    vinit = settings.vinit
    if vinit is not None:
        if not isinstance(vinit, list | tuple) or len(vinit) == 0:
            return False
        if any(entry is not None and not isinstance(entry, Tensor) for entry in vinit):
            return False
    if _literal(settings.backend):
        return False  # its results have other dtypes than a relaxation's state
    # the abstract step runs modules on tensors without values, which hooks must not see
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def loss_with(
    settings: Settings, model, x, y, return_output: bool, clamp=None
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pcfast.pc_loss` while a compiler traces it: one node, or a graph break where the call does not fit.

    Every attribute that is read here is guarded: a change of it traces anew.
    """
    moving = _moving_buffers(model) if _fits(model, x, y, settings, clamp) else None
    described = None if moving is None else describe_loss(settings.loss)
    if described is None or described.kind not in _KINDS:
        return _outside(settings, model, x, y, return_output, clamp)
    device, vinit = x.device.type, settings.vinit or []
    value, output, _, moved = step(
        x.detach(),
        y.detach(),
        list(model.parameters()),
        list(model.buffers()),
        None if described.weight is None else described.weight.detach(),
        [belief.detach() for belief in vinit if belief is not None],
        "".join("0" if belief is None else "1" for belief in vinit),
        torch.empty(0, device=x.device),
        _key(id(model)),
        described.kind,
        described.settings[0],
        *(described.settings[1:] or (-100, 0.0)),
        settings.normalizer,
        canonical(settings.method),
        settings.step_size,
        settings.num_steps,
        settings.backend,
        settings.check,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_grad_enabled(),
    )
    for buffer, new in zip(moving, moved, strict=True):
        buffer.copy_(new)
    return (value, output) if return_output else value
