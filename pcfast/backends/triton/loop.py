"""The loop of strict relaxation on fused kernels: what a design says, executed.

An iteration is two stages (docs/method.md fact 5). Pieces of one stage do not depend on each other: one launch for
all linear layers with the same activation, for each convolution an implicit GEMM or torch's product and an
elementwise launch, torch's operations for what has no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...deviation import Chain
from ...deviation.affine import Conv2dStep, LinearStep
from ...kernels.conv_feedback import launch_conv_feedback
from ...kernels.conv_predict import launch_conv_predict
from ...kernels.grouped_gemm import Gemm
from ...kernels.linear_feedback import launch_linear_feedback
from ...kernels.linear_predict import Epilogue, launch_linear_predict
from ...kernels.linear_problems import as_numbers
from ...kernels.mlp_relaxation import launch_mlp_relaxation
from ...kernels.output_error import output_error
from ...kernels.pointwise_error import Tail, error_and_delta
from ...kernels.pointwise_gram import gram_update
from ...kernels.pointwise_update import update
from ...kernels.tf32 import as_read
from ...losses import PreparedTarget
from ...model.spec import MaxPool2d
from ...problem.belief_optimizers import StepSize, schedule_on_device, step_size_of
from ...support.uploads import uploaded
from ..kernel_forms import LinearForm, PointwiseForm, TorchForm
from .arena import Arena
from .conv_form import ConvForm
from .launch_plan import Design, FeedbackLaunch, PredictLaunch
from .streams import Branches
from .tensor_layout import as_image

if TYPE_CHECKING:
    from ..eager.links import GramLink

# larger than any number of iterations
_NEVER = torch.iinfo(torch.int32).max


@uploaded(capacity=64)
def table(problems: tuple, device: torch.device) -> Tensor:
    """Descriptors as the kernels read them. Cached: a CUDA graph can only be captured where nothing is uploaded."""
    numbers = torch.tensor([as_numbers(problem) for problem in problems], dtype=torch.int64)
    uploaded = numbers.to(device)
    if uploaded.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # other streams may be the next to read it
    return uploaded


@dataclass(frozen=True)
class ForwardState:
    """What the forward pass left for the loop. Lists run over l = 0..L.

    Attributes:
        chains: of the layers, evaluated at the forward pass.
        vhat: activations.
        pre_activations: of layers that begin with a product, linear ones' in the arena; None elsewhere.
        starts: beliefs to start from, as deviations; None from the forward pass.
        target: of the loss, where kernels evaluate it.
        gradient_at: dLoss/dmu at an output, where torch does.
        gram_link: layer 1's coupling in Gram form, or None.
    """

    chains: list[Chain | None]
    vhat: list[Tensor]
    pre_activations: list[Tensor | None]
    starts: list[Tensor] | None
    target: PreparedTarget | None
    gradient_at: Callable[[Tensor], Tensor]
    gram_link: GramLink | None


def arena_of(design: Design, device: torch.device, operand: torch.dtype) -> Arena:
    """Memory for one relaxation. operand: dtype of what products read."""
    return Arena(design.layout, device, torch.float32, operand)


def _tail(form: PointwiseForm) -> Tail:
    if form.pool is None:
        return Tail(form.before, None, (1, 1), form.after)
    kind = "max" if isinstance(form.pool, MaxPool2d) else "average"
    return Tail(form.before, kind, form.pool.kernel, form.after)


def _epilogue(launch: PredictLaunch) -> Epilogue:
    return Epilogue(launch.activation, launch.top_activation, launch.loss)


class Loop:
    """One relaxation under way."""

    def __init__(
        self, design: Design, arena: Arena, inputs: ForwardState, step_size: StepSize, momentum: float = 0.0
    ) -> None:
        self.design, self.inputs = design, inputs
        self.step_size, self.momentum = step_size, momentum
        self.depth = design.depth
        self.device = inputs.vhat[0].device
        self.arena = arena
        self.first_bad = torch.full((self.depth,), _NEVER, dtype=torch.int32, device=self.device)
        self.sum_before: Tensor | None = None
        #: mu_L and eps_L of the last iteration where torch evaluates the loss.
        self.output = inputs.vhat[self.depth]
        self.output_error: Tensor | None = None
        #: Layers of the piece that was started last, for messages.
        self.at_work: tuple[int, ...] = ()
        self._branches = Branches(self.device)
        self._images: dict[int, Tensor] = {}  # uhat of convolutions and pointwise layers, channels-last
        self._winners: dict[int, Tensor] = {}  # of max-pooled implicit GEMMs
        self._tables = [table(launch.problems, self.device) for launch in design.predicts]
        self._feedback_table = design.feedback and table(design.feedback.problems, self.device)
        self._schedule: Tensor | None = None  # where one launch runs all iterations
        if design.fuse_loop and isinstance(step_size, tuple):
            self._schedule = schedule_on_device(step_size, arena.state.dtype, self.device)
        #: What the launches read and a cache may let go.
        self.resources = (*self._tables, self._feedback_table, self._schedule)
        self._fill()

    # before the loop

    def _fill(self) -> None:
        design, inputs, matrix = self.design, self.inputs, self.arena.matrix
        for l in range(2, self.depth + 1):
            form, below = design.forms[l], design.boundaries[l - 1]
            if isinstance(form, LinearForm):
                step = next(s for s in inputs.chains[l].steps if isinstance(s, LinearStep))
                in_gram_form = design.gram and l == 2
                weight = step.gram() if in_gram_form else below.weight_in_memory(step.weight)
                matrix(f"weight{l}")[: form.out_features].copy_(as_read(weight, self._precision(l)))
            elif isinstance(form, PointwiseForm):
                self._images[l] = self._image_of_uhat(l, form)
            elif isinstance(form, ConvForm):
                self._fill_convolution(l, form)
        if isinstance(design.forms[self.depth], LinearForm):
            matrix("vhat" + str(self.depth)).copy_(inputs.vhat[self.depth])
            matrix("target" + str(self.depth)).copy_(inputs.target.target)
            if inputs.target.target_sum is not None:
                matrix("target_sum").copy_(inputs.target.target_sum.reshape(1, -1))
        if inputs.starts is not None:
            for l in range(1, self.depth):
                moved = design.boundaries[l].in_memory(inputs.starts[l])
                matrix(f"d{l}").copy_(moved)
                if design.target.copies(design.forms[l + 1]):
                    matrix(f"d_operand{l}").copy_(as_read(moved, self._precision(l + 1)))

    def _precision(self, l: int) -> str:
        """Of layer l's products."""
        target = self.design.target
        return target.precision if isinstance(self.design.forms[l], LinearForm) else target.convolutions

    def _fill_convolution(self, l: int, form: ConvForm) -> None:
        weight = as_read(self._convolution(l, form).weight, self._precision(l))
        self._weight_image(l, form).copy_(weight.permute(0, 2, 3, 1))
        self._images[l] = self._image_of_uhat(l, form)
        if form.geometry.pool == "max":
            self._winners[l] = torch.empty(
                self._image("delta", l).shape, dtype=torch.uint8, device=self.device
            )

    def _image_of_uhat(self, l: int, form: PointwiseForm | ConvForm) -> Tensor:
        """uhat (batch, height, width, channels): after the convolution, or what the layer reads."""
        if form.convolution is not None:
            return self.inputs.pre_activations[l].permute(0, 2, 3, 1).contiguous()
        below = self.design.boundaries[l - 1]
        return below.image(below.in_memory(self.inputs.vhat[l - 1]).contiguous())

    # the loop

    def run(self, num_steps: int, each: Callable[[int], None] | None = None) -> None:
        """All iterations; ``each`` is called between the stages of each one. With 0, errors are evaluated once."""
        fuse_loop = self.design.fuse_loop and each is None and num_steps > 0
        if fuse_loop:
            self._run_fused(num_steps)
            return
        for t in range(1, max(num_steps, 1) + 1):
            self._branches.run(self._predict_pieces(t))
            if each is not None and num_steps:
                each(t)
            if num_steps == 0:
                return
            if t == num_steps and self.design.gram and not self.design.gram_by_torch:
                self.sum_before = self.arena.matrix("sum2").clone()
            self._branches.run(self._feedback_pieces(t))

    def front(self, t: int) -> int:
        """The lowest layer with an error in iteration t (active front, docs/method.md fact 3)."""
        return max(self.depth - t + 1, 1) if self.design.fresh else 1

    def _moved(self, l: int, t: int) -> bool:
        """Whether v_l differs from its forward pass when iteration t begins."""
        return l >= 1 and (not self.design.fresh or l >= self.depth - t + 1)

    def _eta(self, t: int) -> float:
        return step_size_of(self.step_size, t)

    def _piece(self, layers: Sequence[int], work: Callable, *arguments) -> Callable[[], None]:
        """``work`` on the predictions of some layers, or on the feedback through them."""

        def piece() -> None:
            self.at_work = tuple(layers)
            work(*arguments)

        return piece

    def _predict_pieces(self, t: int) -> list[Callable[[], None]]:
        front = max(self.front(t), 2)
        pieces = []
        for launch, problems in zip(self.design.predicts, self._tables, strict=True):
            live = [l for l in launch.layers if l >= front]
            if live:
                pieces.append(self._piece(live, self._predict_linear, launch, problems, live, t))
        for l in range(front, self.depth + 1):
            form = self.design.forms[l]
            if isinstance(form, PointwiseForm):
                pieces.append(self._piece([l], self._predict_pointwise, l, form, self._moved(l - 1, t)))
            elif isinstance(form, ConvForm):
                pieces.append(self._piece([l], self._predict_convolution, l, form, self._moved(l - 1, t)))
            elif isinstance(form, TorchForm):
                pieces.append(self._piece([l], self._predict_torch, l, self._moved(l - 1, t)))
        return pieces

    def _feedback_pieces(self, t: int) -> list[Callable[[], None]]:
        lowest = max(self.front(t) - 1, 1)
        pieces = []
        launch = self.design.feedback
        if launch is not None:
            through = [link + 1 for link in launch.links if link >= lowest]
            if through:
                pieces.append(self._piece(through, self._feedback_linear, launch, len(through), t))
        for link in range(lowest, self.depth):
            form = self.design.forms[link + 1]
            if isinstance(form, PointwiseForm):
                pieces.append(self._piece([link + 1], self._feedback_pointwise, link, form, t))
            elif isinstance(form, ConvForm):
                pieces.append(self._piece([link + 1], self._feedback_convolution, link, form, t))
            elif isinstance(form, TorchForm):
                pieces.append(self._piece([link + 1], self._feedback_torch, link, t))
        return pieces

    # linear layers

    @property
    def _arenas(self) -> tuple[Tensor, Tensor]:
        """State and operands as linear kernels take them."""
        arena = self.arena
        return arena.state, arena.operand if self.design.target.linear_copies else arena.state

    def _gemm(self, launch: PredictLaunch | FeedbackLaunch) -> Gemm:
        return Gemm(launch.tiles, self.design.target.precision, launch.aligned)

    def _loss_scale(self) -> float:
        return 1.0 if self.inputs.target is None else self.inputs.target.scale

    def _predict_linear(self, launch: PredictLaunch, problems: Tensor, live: Sequence[int], t: int) -> None:
        products = sum(self._moved(l - 1, t) for l in live)
        # at most one layer has an error while its prediction has not moved; its problem follows those with products
        front = len(launch.layers) + products if products < len(live) else -1
        launch_linear_predict(
            *self._arenas, problems, products=products, front=front,
            loss_scale=self._loss_scale(), programs=launch.programs, gemm=self._gemm(launch),
            epilogue=_epilogue(launch),
        )  # fmt: skip
        if self.design.wide_top and self.depth in live:
            self.at_work = (self.depth,)
            self._wide_output_error()

    def _wide_output_error(self) -> None:
        top, matrix, target = str(self.depth), self.arena.matrix, self.inputs.target
        output_error(
            product=matrix("s" + top),
            uhat=matrix("uhat" + top),
            vhat=matrix("vhat" + top),
            target=matrix("target" + top),
            error=matrix("error" + top),
            delta=matrix("delta" + top),
            target_sum=None if target.target_sum is None else matrix("target_sum").reshape(-1, 1),
            scale=target.scale,
            activation=self.design.forms[self.depth].activation,
            precision=self.design.target.precision,
        )

    def _feedback_linear(self, launch: FeedbackLaunch, count: int, t: int) -> None:
        launch_linear_feedback(
            *self._arenas, self._feedback_table, self.first_bad, count=count, iteration=t,
            eta=self._eta(t), momentum=self.momentum, programs=launch.programs, gemm=self._gemm(launch),
        )  # fmt: skip

    def _run_fused(self, num_steps: int) -> None:
        (launch,) = self.design.predicts
        self.at_work = launch.layers
        eta = self.step_size if self._schedule is None else self._schedule

        def iterations(first: int, last: int) -> None:
            launch_mlp_relaxation(
                *self._arenas, self._tables[0], self._feedback_table, self.first_bad,
                layers=len(launch.layers), first=first, last=last, fresh=self.design.fresh,
                eta=eta, momentum=self.momentum, loss_scale=self._loss_scale(),
                programs=launch.programs, gemm=self._gemm(launch), epilogue=_epilogue(launch),
            )  # fmt: skip

        if not self.design.gram:
            iterations(1, num_steps)
            return
        if num_steps > 1:
            iterations(1, num_steps - 1)
        self.sum_before = self.arena.matrix("sum2").clone()
        iterations(num_steps, num_steps)

    # convolutions as implicit GEMMs

    def _weight_image(self, l: int, form: ConvForm) -> Tensor:
        """(Cout, KH, KW, Cin)."""
        geometry = form.geometry
        return self.arena.matrix(f"weight{l}").view(
            geometry.out_channels, *geometry.kernel, geometry.channels
        )

    def _predict_convolution(self, l: int, form: ConvForm, moved: bool) -> None:
        launch_conv_predict(
            form.geometry, d=self._image("d_operand", l - 1) if moved else None, weight=self._weight_image(l, form),
            uhat=self._images[l], d_out=self._image("d", l), error=self._image("error", l),
            delta=self._image("delta", l), winner=self._winners.get(l), before=form.before, after=form.after,
            precision=self.design.target.convolutions,
        )  # fmt: skip

    def _feedback_convolution(self, link: int, form: ConvForm, t: int) -> None:
        launch_conv_feedback(
            form.geometry, delta=self._image("delta", link + 1), winner=self._winners.get(link + 1),
            weight=self._weight_image(link + 1, form), d=self._image("d", link), error=self._image("error", link),
            copy=self._operand_copy(link), velocity=self._velocity(link), first_bad=self.first_bad, layer=link,
            iteration=t, eta=self._eta(t), momentum=self.momentum, clamped=link == 1,
            precision=self.design.target.convolutions,
        )  # fmt: skip

    # torch's convolutions, and layers without a product

    def _image(self, name: str, l: int) -> Tensor:
        """A matrix of belief l's size as (batch, height, width, channels)."""
        return self.design.boundaries[l].image(self.arena.matrix(f"{name}{l}"))

    def _delta_image(self, l: int, form: PointwiseForm) -> Tensor:
        return as_image(self.arena.matrix(f"delta{l}"), *form.inner)

    def _convolution(self, l: int, form: PointwiseForm | ConvForm) -> Conv2dStep:
        return self.inputs.chains[l].steps[form.convolution]

    def _predict_pointwise(self, l: int, form: PointwiseForm, moved: bool) -> None:
        product = None
        if moved and self.design.gram and l == 2:
            product = self._gram_image("s", form)
        elif moved and form.convolution is not None:
            d = self._image("d_operand", l - 1).permute(0, 3, 1, 2)
            product = self._convolution(l, form).product(d).permute(0, 2, 3, 1).contiguous()
        elif moved:
            product = self._image("d", l - 1)
        error_and_delta(
            product=product,
            uhat=self._images[l],
            deviation=self._image("d", l),
            error=self._image("error", l),
            delta=self._delta_image(l, form),
            tail=_tail(form),
        )

    def _feedback_pointwise(self, link: int, form: PointwiseForm, t: int) -> None:
        pulled = self._delta_image(link + 1, form)
        if self.design.gram and link == 1:
            self._move_in_gram_form(form, pulled, t)
            return
        if form.convolution is not None:
            step, below = self._convolution(link + 1, form), self._image("d_operand", link)
            pulled = step.product_pulled_back(pulled.permute(0, 3, 1, 2), like=below.permute(0, 3, 1, 2))
            pulled = pulled.permute(0, 2, 3, 1).contiguous()
        self._move(link, pulled, t)

    def _gram_image(self, name: str, form: PointwiseForm) -> Tensor:
        """s or sum of layer 2's convolution, or a velocity of them (batch, height, width, channels)."""
        return as_image(self.arena.matrix(f"{name}2"), *form.inner)

    def _move_in_gram_form(self, form: PointwiseForm, delta: Tensor, t: int) -> None:
        step, gram = self._convolution(2, form), self.inputs.gram_link.gram
        gram_update(
            s=self._gram_image("s", form),
            total=self._gram_image("sum", form),
            delta=delta,
            pulled=step.gram_convolved(gram, delta.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous(),
            step_size=self._eta(t),
            first_bad=self.first_bad,
            layer=1,
            iteration=t,
            velocity=self._gram_image("s_velocity", form) if self.design.momentum else None,
            total_velocity=self._gram_image("sum_velocity", form) if self.design.momentum else None,
            momentum=self.momentum,
        )

    def _move(self, link: int, pulled: Tensor, t: int) -> None:
        """d += eta (error - pulled), or along its velocity; ``pulled`` (batch, height, width, channels)."""
        update(
            deviation=self._image("d", link),
            error=self._image("error", link),
            pulled=pulled,
            step_size=self._eta(t),
            first_bad=self.first_bad,
            layer=link,
            iteration=t,
            operand=self._operand_copy(link),
            clamped=link == 1,
            velocity=self._velocity(link),
            momentum=self.momentum,
        )

    def _velocity(self, link: int) -> Tensor | None:
        return self._image("velocity", link) if self.design.momentum else None

    def _operand_copy(self, link: int) -> Tensor | None:
        """Where d_link is kept, rounded, for the product above; None where that reads d itself."""
        copied = self.design.target.copies(self.design.forms[link + 1])
        return self._image("d_operand", link) if copied else None

    # what torch does

    def _predict_torch(self, l: int, moved: bool) -> None:
        link = self.inputs.gram_link if l == 2 else None  # None unless in Gram form
        deviation = None
        if link is not None:
            deviation = link.predict() if link.moved else None
        elif moved:
            deviation = self.inputs.chains[l].deviate(self._logical("d", l - 1))
        if l == self.depth:
            vhat = self.inputs.vhat[l]
            self.output = vhat if deviation is None else vhat + deviation
            self.output_error = self.inputs.gradient_at(self.output)
            return
        error, d = self.arena.matrix(f"error{l}"), self.arena.matrix(f"d{l}")
        if deviation is None:
            torch.neg(d, out=error)
        else:
            torch.sub(self.design.boundaries[l].in_memory(deviation), d, out=error)

    def _feedback_torch(self, link: int, t: int) -> None:
        l = link + 1
        error = self.output_error if l == self.depth else self._logical("error", l)
        if link == 1 and self.inputs.gram_link is not None:
            self.inputs.gram_link.descend(None, error, self._eta(t), t)
            return
        bound = self.design.boundaries[link]
        pulled = bound.in_memory(self.inputs.chains[l].pullback(error)).contiguous()
        self._move(link, bound.image(pulled), t)

    # results

    def _logical(self, name: str, l: int) -> Tensor:
        """A matrix of belief l's size as torch has it (batch, *shape)."""
        return self.design.boundaries[l].logical(self.arena.matrix(f"{name}{l}"))

    def deviation(self, l: int) -> Tensor:
        """d_l as torch has it."""
        return self._logical("d", l)

    def gram_state(self) -> tuple[Tensor, Tensor, Tensor]:
        """(s, sum, sum before the last iteration) as torch has u_2, where kernels move them."""
        form, state = (
            self.design.forms[2],
            (self.arena.matrix("s2"), self.arena.matrix("sum2"), self.sum_before),
        )
        if isinstance(form, LinearForm):
            return tuple(map(self.design.boundaries[2].logical, state))
        return tuple(as_image(matrix, *form.inner).permute(0, 3, 1, 2) for matrix in state)

    def error(self, l: int) -> Tensor:
        """eps_l of the last iteration as torch has it; at L (batch, outputs)."""
        if l == self.depth and self.output_error is not None:
            return self.output_error
        return self._logical("error", l)
