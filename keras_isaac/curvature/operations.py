"""The operations that condition: each computes what the plain one does, and passes a kernel's gradient through the conditioner.

Every path from a loss to a kernel, derivatives by the inputs included, goes through one of them exactly once. Without a twin
and an output damping they are linear in the gradient, and have a forward mode.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.curvature import conditioner
from keras_isaac.curvature.rows import spread


@dataclasses.dataclass(frozen=True)
class ProductFunctions:
    """What `backend.product` does beside multiplying; each function ends with the residuals.

    Args:
        tangent: function of `rows` and a tangent of the kernel, which returns that of the product.
        condition: function of `rows` and the gradient of their product, which returns the kernel's, conditioned.
        gate: function of `kernel`, `twin` and `rows`, which returns the kernel with its gradient conditioned.
    """

    tangent: Callable
    condition: Callable
    gate: Callable


def conditioned_kernel(kernel, twin, rows, damping, num_rows=None, *, is_relative=False):
    """Returns `kernel`; its gradient is conditioned on `rows` when it is finished.

    Args:
        kernel: tensor `[..., in, out]`.
        twin: tensor of the same value, which gets the plain gradient (see `twinned`), or `None`.
        rows: tensor `[..., rows, in]`, the rows that stand for the layer's inputs; no gradient flows into them.
        damping: scalar tensor.
        num_rows: tensor that broadcasts to `[..., 1, 1]`, how many of the rows count, where others are zero. `None`: all count.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.
    """
    residuals = (backend.stop_gradient(rows), damping, num_rows)
    return backend.gate(kernel, twin, residuals, functools.partial(conditioner.condition, is_relative=is_relative))


def conditioned_matmul(rows, kernel, twin, damping, *, is_relative=False, max_rows=None):
    """Returns `rows @ kernel`; the gradient of `kernel` is conditioned on the sample side, where that is the smaller.

    Args:
        rows: tensor `[..., rows, in]`.
        kernel: tensor `[..., in, out]`.
        twin: as in `conditioned_kernel`.
        damping: scalar tensor.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.
        max_rows: integer, how many rows at most stand for all where the other side is taken, or `None`.
    """

    def tangent(rows, kernel_tangent, damping):
        return conditioner.sample_side_tangent(rows, kernel_tangent, damping, is_relative)

    def condition(rows, output_gradient, damping):
        rows, output_gradient = conditioner.in_full_precision(rows, output_gradient)

        def few():
            return conditioner.sample_side(rows, output_gradient, damping, is_relative)

        def many():
            gradient = backend.transpose(rows) @ output_gradient
            return conditioner.condition(gradient, spread(rows, max_rows), damping, is_relative=is_relative)

        num_in = rows.shape[-1]
        conditioned = conditioner.if_at_most(num_in if max_rows is None else min(num_in, max_rows), rows, few, many)
        return conditioner.cast(conditioned, kernel.dtype)

    def gate(kernel, twin, rows, damping):
        return conditioned_kernel(kernel, twin, spread(rows, max_rows), damping, is_relative=is_relative)

    return backend.product(rows, kernel, twin, (damping,), ProductFunctions(tangent, condition, gate))


def twinned(kernel):
    """Returns `kernel` twice; what comes back to it is the gradient of the first, as long as that of the second."""

    def gradients(output_gradients, kernel):
        conditioned, plain = output_gradients
        return (conditioner.with_norm_of(plain, conditioned),)

    return backend.with_gradients(lambda kernel: (kernel * 1, kernel * 1), gradients, kernel)


def output_conditioned_kernel(kernel, carrier, damping, mask, rows_of, *, is_relative=False):
    """Returns `kernel` and `carrier`; the kernel's gradient is conditioned on that of the layer's product.

    Args:
        kernel: tensor `[..., in, out]`.
        carrier: tensor of zeros, which the caller adds to the layer's product, so that it gets the product's gradient.
        damping: scalar tensor (λ_g).
        mask: tensor, handed to `rows_of`, or `None`.
        rows_of: function of the carrier's gradient and the mask, which returns `Rows` `[..., rows, out]`, and how many rows
            there are before some stand for all.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.
    """

    def gradients(output_gradients, kernel, carrier, damping, mask):
        kernel_gradient, output_gradient = output_gradients
        rows, total = rows_of(output_gradient, mask)
        if not is_relative:
            _, damping = conditioner.in_full_precision(kernel_gradient, damping)
            total = ops.cast(total, damping.dtype)
            if rows.num_counted is not None:
                counted, sampled = (
                    ops.cast(size, damping.dtype) for size in (backend.clip(rows.num_counted, 1), ops.shape(rows.values)[-2])
                )
                total = counted * total / sampled
            # The gradients of a mean over r rows are those of the rows' own losses, divided by r.
            damping = damping / total / total
        conditioned = conditioner.condition_outputs(kernel_gradient, rows.values, damping, rows.num_counted, is_relative)
        return conditioned, None, None, None

    def identity(kernel, carrier, damping, mask):
        return kernel * 1, carrier * 1

    return backend.with_gradients(identity, gradients, kernel, carrier, damping, mask)


def scaled_gradient(tensor, twin, scale):
    """Returns `tensor`; its gradient is multiplied by `scale`, which broadcasts to it."""

    def condition(gradient, scale):
        # In float32 or better: a small scale is zero in float16.
        (full,) = conditioner.in_full_precision(gradient)
        return conditioner.cast(full * conditioner.cast(scale, full.dtype), gradient.dtype)

    return backend.gate(tensor, twin, (backend.stop_gradient(scale),), condition)


def kernel_conditioned_later(kernel, twin, carrier, damping, rows_of, *, is_relative=False):
    """Returns `kernel` and `carrier`; the kernel's gradient is conditioned on rows that only its use brings forth.

    Args:
        kernel: tensor `[in, out]`.
        twin: as in `conditioned_kernel`.
        carrier: tensor of zeros `[..., features + 1]`. Its gradient is what `send` sends: features, and a one behind them.
        damping: scalar tensor.
        rows_of: function of the features that were sent, which returns `Rows` `[rows, in]`.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.
    """

    def gradients(output_gradients, kernel, twin, carrier, damping):
        kernel_gradient, sent = output_gradients
        # A loss that holds derivatives sends the features several times, and the ones count how often.
        rows = rows_of(sent[..., :-1] / backend.clip(sent[..., -1:], 1))
        conditioned = conditioner.condition(kernel_gradient, rows.values, damping, rows.num_counted, is_relative)
        return conditioned, None if twin is None else kernel_gradient, None, None

    def identity(kernel, twin, carrier, damping):
        return kernel * 1, carrier * 1

    return backend.with_gradients(identity, gradients, kernel, twin, carrier, damping)


def send(results, carrier, features):
    """Returns a nest of several tensors; whenever a gradient passes them, the carrier gets the features for its own."""
    features = backend.stop_gradient(ops.cast(features, carrier.dtype))
    message = ops.concatenate([features, ops.ones_like(features[..., :1])], axis=-1)
    return keras.tree.pack_sequence_as(results, list(_sending(keras.tree.flatten(results), carrier, message)))


def _sending(tensors, carrier, message):
    def gradients(output_gradients, *inputs):
        *_, carrier, message = inputs
        # The loss may hold nothing of the call but its derivatives, which therefore send too.
        return *_sending(output_gradients, carrier, message), message, None

    return backend.with_gradients(lambda *inputs: inputs[:-2], gradients, *tensors, carrier, message)
