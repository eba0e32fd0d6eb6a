"""Strict and fixed-prediction relaxation in one jitted JAX function with a fori_loop: what a JAX author writes.

Imported only where jax is. The networks' weights are handed over as numpy arrays; layers as in loops.py.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torch import Tensor, nn

#: jax's names of what the precisions mean for matrix products.
PRECISIONS = {"ieee": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16", "fp64": "highest"}


def prepare(
    model: nn.Sequential, x: Tensor, y: Tensor, method: str, step_size: float, num_steps: int, precision: str
):
    """``step() -> updates`` (a list of jax arrays in the order of ``model.parameters()``), not waited for."""
    layers = [_layer(layer) for layer in model]
    weights = [[jnp.asarray(p.detach().cpu().numpy()) for p in layer.parameters()] for layer in model]
    inputs, labels = jnp.asarray(x.cpu().numpy()), jnp.asarray(y.cpu().numpy())
    run = jax.jit(partial(_step, layers, method, step_size, num_steps))

    def step():
        with jax.default_matmul_precision(PRECISIONS[precision]):
            result = run(weights, inputs, labels)
        return [update for layer in result for update in layer]

    return step


def wait(updates) -> None:
    jax.block_until_ready(updates)


def as_arrays(updates) -> list[np.ndarray]:
    return [np.asarray(update) for update in updates]


def _layer(layer: nn.Module):
    """The layer as a function f(weights, v)."""
    modules = list(layer) if isinstance(layer, nn.Sequential) else [layer]

    def apply(weights, v):
        for m in modules:
            if isinstance(m, nn.Linear):
                v = v @ weights[0].T + weights[1]
            elif isinstance(m, nn.Conv2d):
                padding = [(p, p) for p in m.padding]
                v = lax.conv_general_dilated(
                    v, weights[0], m.stride, padding, dimension_numbers=("NCHW", "OIHW", "NCHW")
                )
                v = v + weights[1][:, None, None]
            elif isinstance(m, nn.MaxPool2d):
                window = (1, 1, m.kernel_size, m.kernel_size)
                v = lax.reduce_window(v, -jnp.inf, lax.max, window, window, "VALID")
            elif isinstance(m, nn.Flatten):
                v = v.reshape(len(v), -1)
            elif isinstance(m, nn.GELU):
                v = jax.nn.gelu(v, approximate=False)
            else:
                v = jax.nn.relu(v) if isinstance(m, nn.ReLU) else jnp.tanh(v)
        return v

    return apply


def _loss(mu, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(mu), y[:, None], 1))


def _step(layers, method, step_size, num_steps, weights, x, y):
    depth = len(layers)
    vhat = [x]
    for f, w in zip(layers, weights, strict=True):
        vhat.append(f(w, vhat[-1]))
    if method == "exact":
        return jax.grad(lambda ws: _loss(_output(layers, ws, x), y))(weights)

    def strict(_, state):
        v, _ = state
        mu, feed = [vhat[1]], [None]
        for l in range(1, depth):
            value, back = jax.vjp(partial(layers[l], weights[l]), v[l])
            mu.append(value)
            feed.append(back)
        errors = [mu[l - 1] - v[l] for l in range(1, depth)] + [jax.grad(_loss)(mu[-1], y)]
        moved = [v[l] + step_size * (errors[l - 1] - feed[l](errors[l])[0]) for l in range(1, depth)]
        return [x, *moved, v[depth]], errors

    top = jax.grad(_loss)(vhat[-1], y)
    pulls = [jax.vjp(partial(f, w), v)[1] for f, w, v in zip(layers, weights, vhat, strict=False)]

    def fixed(_, state):
        v, _ = state
        errors = [vhat[l] - v[l] for l in range(1, depth)] + [top]
        moved = [v[l] + step_size * (errors[l - 1] - pulls[l](errors[l])[0]) for l in range(1, depth)]
        return [x, *moved, v[depth]], errors

    start = (vhat, [jnp.zeros_like(value) for value in vhat[1:-1]] + [top])
    v, errors = lax.fori_loop(0, num_steps, strict if method == "strict" else fixed, start)
    points = v if method == "strict" else vhat
    return [
        jax.vjp(lambda w, l=l: layers[l](w, points[l]), weights[l])[1](errors[l])[0] for l in range(depth)
    ]


def _output(layers, weights, x):
    for f, w in zip(layers, weights, strict=True):
        x = f(w, x)
    return x
