"""Operations that compute what the plain ones do, and pass the gradient of the kernel through the conditioner.

Every path from a loss to a kernel, derivatives with respect to the inputs included, goes through one of them exactly once.
Without `preserve_norm` and an output damping they are linear in the gradient, and support forward-mode differentiation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.curvature import conditioner, plan
from keras_isaac.curvature.rows import KernelCall, Rows, condensed, num_read, product_rows
from keras_isaac.scope import Conditioning


@dataclasses.dataclass(frozen=True)
class ProductFunctions:
    """The derivatives of `backend.product`; each function takes the residuals last.

    Args:
        tangent: function of `rows` and a tangent of the kernel, which returns that of the product.
        condition: function of `rows` and the gradient of their product, which returns the kernel's, conditioned.
        gate: function of `kernel` and `rows`, which returns the kernel with its gradient conditioned.
    """

    tangent: Callable
    condition: Callable
    gate: Callable


def conditioned(matrix: Any, conditioning: Conditioning, rows: Rows) -> Any:
    """Returns a kernel; its gradient is conditioned on rows when the backward pass has finished it.

    Args:
        matrix: tensor `[(groups,) in, out]`, the kernel.
        conditioning: the `Conditioning` in force.
        rows: `Rows` of the layer's inputs; no gradient flows into them.
    """
    conditioning.refuse_outputs()
    rows = condensed(rows, tuple(matrix.shape), conditioning)
    call = KernelCall(tuple(matrix.shape), rows)
    conditioning.note(call)
    return _gated(matrix, rows, plan.choose(call), conditioning)


def _gated(kernel: Any, rows: Rows, form: str | None, conditioning: Conditioning) -> Any:
    # Numbers are part of the function; tensors are saved for the backward pass.
    counts = rows.num_sampled, rows.num_valid
    is_static = isinstance(rows.num_sampled, int) and isinstance(rows.num_valid, int)
    residuals = (ops.stop_gradient(rows.values), conditioning.damping, *(() if is_static else counts))
    condition = functools.partial(
        _condition_finished, static_counts=counts if is_static else (), form=form, conditioning=conditioning
    )
    return backend.gate(kernel, residuals, condition, is_linear=not conditioning.preserve_norm)


def _condition_finished(
    gradient: Any,
    values: Any,
    damping: Any,
    *counts: Any,
    static_counts: tuple[int, ...] = (),
    form: str | None,
    conditioning: Conditioning,
) -> Any:
    counts, is_relative = counts or static_counts, conditioning.relative_damping
    conditioned = conditioner.condition(gradient, values, damping, *counts, form=form, is_relative=is_relative)
    return conditioner.with_norm_of(gradient, conditioned) if conditioning.preserve_norm else conditioned


def conditioned_late(
    kernel: keras.Variable,
    conditioning: Conditioning,
    shape: tuple[Any, ...],
    rows_of: Callable[[Any], Rows],
    columns: int | None,
) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Returns a kernel, conditioned on rows that are known only after the layer's call, and a function that brings them.

    The function returns its first argument, the results of the call, which bring its second, the features that the kernel
    multiplied in it, to the conditioner in the backward pass. The kernel comes with a *gradient probe*, a tensor of zeros. In
    the backward pass, the results route the features to the probe, as its gradient, which reaches the conditioner together
    with that of the kernel.

    Args:
        kernel: variable `[..., out]`.
        conditioning: the `Conditioning` in force.
        shape: tuple, the shape of the features, `[samples, steps, ...]`.
        rows_of: function of the features, which returns `Rows`.
        columns: integer, how many columns of the kernel multiply the rows; `None` for all.
    """
    conditioning.refuse_outputs()
    value = ops.convert_to_tensor(kernel)
    matrix = ops.reshape(value, (-1, value.shape[-1]))
    read_shape = tuple(matrix[:, :columns].shape)

    def condensed_rows(features: Any) -> Rows:
        return condensed(rows_of(features), read_shape, conditioning)

    def gradients(output_gradients: tuple[Any, Any], kernel: Any, probe: Any, damping: Any) -> tuple[Any, None, None]:
        gradient, routed = output_gradients
        # A loss that contains derivatives routes the features several times. The last feature counts them.
        rows = condensed_rows(routed[..., :-1] / backend.clip(routed[..., -1:], 1))
        form, counts = plan.choose(KernelCall(read_shape, rows)), (rows.num_sampled, rows.num_valid)
        return _condition_finished(gradient, rows.values, damping, *counts, form=form, conditioning=conditioning), None, None

    # One extra feature, which counts how often the features were routed.
    probe = ops.zeros((*shape[:-1], shape[-1] + 1), value.dtype)
    read, probe = backend.with_gradients(
        lambda kernel, probe, damping: (kernel * 1, probe * 1), gradients, matrix[:, :columns], probe, conditioning.damping
    )

    def bring(results: Any, features: Any) -> Any:
        features = ops.reshape(features, shape)
        if conditioning.record is not None:
            conditioning.note(KernelCall(read_shape, condensed_rows(features)))
        features = ops.stop_gradient(ops.cast(features, probe.dtype))
        message = ops.concatenate([features, ops.ones_like(features[..., :1])], axis=-1)
        return keras.tree.pack_sequence_as(results, list(_route_gradient(keras.tree.flatten(results), probe, message)))

    matrix = read if columns is None else ops.concatenate([read, matrix[:, columns:]], axis=1)
    return ops.reshape(matrix, value.shape), bring


def _route_gradient(tensors: Sequence[Any], probe: Any, message: Any) -> tuple[Any, ...]:
    """Returns the tensors; a gradient that passes through them adds the message to the probe's gradient."""

    def gradients(output_gradients: Sequence[Any], *inputs: Any) -> tuple[Any, ...]:
        *_, probe, message = inputs
        # The loss may contain only derivatives of the results, which therefore route the features too.
        return *_route_gradient(output_gradients, probe, message), message, None

    return backend.with_gradients(lambda *inputs: inputs[:-2], gradients, *tensors, probe, message)


def conditioned_matmul(inputs: Any, kernel: Any, conditioning: Conditioning, rows: Rows, is_whole: bool) -> Any:
    """Returns `inputs @ kernel`; the kernel's gradient is conditioned, in the backward pass of the product where possible.

    Args:
        inputs: tensor `[..., rows, in]`, all rows of the product.
        kernel: tensor `[..., in, out]`.
        conditioning: the `Conditioning` in force.
        rows: `Rows` of the inputs.
        is_whole: boolean, whether they are all rows of the inputs.
    """
    shape, has_outputs = tuple(kernel.shape), conditioning.output_damping is not None
    # The norm is known only once the gradient is finished.
    has_product = is_whole and (has_outputs or not conditioning.preserve_norm)
    call = KernelCall(shape, rows, has_product, _num_output_rows(inputs, shape, conditioning, rows) if has_outputs else None)
    if conditioning.record is not None:
        conditioning.note(call)
    form = plan.choose(call)
    if has_outputs:
        return _matmul_with_outputs(inputs, kernel, rows, form, conditioning)
    if not (has_product and form in (plan.SAMPLE, None)):
        # `keras.ops.matmul` returns float32 for float64 on PyTorch.
        return inputs @ _gated(kernel, rows, form, conditioning)
    is_relative, dtype = conditioning.relative_damping, kernel.dtype

    def tangent(inputs: Any, kernel_tangent: Any, damping: Any) -> Any:
        return conditioner.sample_side_tangent(inputs, kernel_tangent, damping, is_relative)

    condition = functools.partial(conditioner.condition_product, form=form, is_relative=is_relative, dtype=dtype)

    def gate(kernel: Any, inputs: Any, damping: Any) -> Any:
        return _gated(kernel, rows.of(inputs), None, conditioning)

    return backend.product(inputs, kernel, (conditioning.damping,), ProductFunctions(tangent, condition, gate))


def _num_output_rows(inputs: Any, shape: tuple[int, ...], conditioning: Conditioning, rows: Rows) -> int | None:
    num_rows = inputs.shape[-2]
    num_sums = plan.num_kept(rows.num_total, shape[-1], shape[-2], rows.is_shared, conditioning.max_rows)
    return num_rows if num_rows is None or num_sums is None else min(num_rows, num_read(conditioning), num_sums)


def _matmul_with_outputs(inputs: Any, kernel: Any, rows: Rows, form: str | None, conditioning: Conditioning) -> Any:
    """Returns the product under an output damping, which is not linear in the gradient."""
    is_relative, output_damping = conditioning.relative_damping, conditioning.output_damping

    def gradients(
        output_gradient: Any, inputs: Any, kernel: Any, damping: Any, output_damping: Any, values: Any
    ) -> tuple[Any, ...]:
        full_inputs, full_gradient = conditioner.in_full_precision(inputs, output_gradient)
        plain = backend.transpose(full_inputs) @ full_gradient
        if form in (plan.SAMPLE, None):
            conditioned = conditioner.condition_product(full_inputs, full_gradient, damping, form, is_relative, plain.dtype)
        else:
            counts = rows.num_sampled, rows.num_valid
            conditioned = conditioner.condition(plain, values, damping, *counts, form=form, is_relative=is_relative)
        outputs = product_rows(full_gradient, conditioning, rows.is_shared, rows.num_total)
        outputs = condensed(outputs, (*kernel.shape[:-2], *kernel.shape[:-3:-1]), conditioning)
        # The gradients of a mean over r rows are those of the rows' own losses, divided by r.
        scale = 1 if is_relative else ops.cast(ops.shape(full_gradient)[-2], plain.dtype)
        output_damping = conditioner.cast(output_damping, plain.dtype) / scale / scale
        counts = outputs.num_sampled, outputs.num_valid
        conditioned = conditioner.condition_outputs(conditioned, outputs.values, output_damping, *counts, is_relative)
        if conditioning.preserve_norm:
            conditioned = conditioner.with_norm_of(plain, conditioned)
        # The gradient that reaches the kernel through the input gradient is conditioned too.
        inputs_only = dataclasses.replace(conditioning, damping=damping, output_damping=None)
        gated = _gated(kernel, rows.of(values), None, inputs_only)
        inputs_gradient = output_gradient @ backend.transpose(gated)
        return inputs_gradient, conditioner.cast(conditioned, kernel.dtype), None, None, None

    def multiply(inputs: Any, kernel: Any, *_: Any) -> Any:
        return inputs @ kernel

    values = ops.stop_gradient(rows.values)
    return backend.with_gradients(multiply, gradients, inputs, kernel, conditioning.damping, output_damping, values)


def scaled_gradient(tensor: Any, scale: Any) -> Any:
    """Returns `tensor`; its gradient is multiplied by `scale`, which broadcasts to it."""

    def condition(gradient: Any, scale: Any) -> Any:
        # In float32 or better: a small scale is zero in float16.
        (full,) = conditioner.in_full_precision(gradient)
        return conditioner.cast(full * conditioner.cast(scale, full.dtype), gradient.dtype)

    return backend.gate(tensor, (ops.stop_gradient(scale),), condition)


def scaled_gradient_of_norm(tensor: Any, scale: Any) -> Any:
    """Returns `tensor`; its gradient is multiplied by `scale`, and then scaled back to its original norm."""

    def gradients(output_gradient: Any, tensor: Any, scale: Any) -> tuple[Any, ...]:
        full, scale = conditioner.in_full_precision(output_gradient, scale)
        return conditioner.cast(conditioner.with_norm_of(full, full * scale), tensor.dtype), None

    return backend.with_gradients(lambda tensor, scale: tensor * 1, gradients, tensor, ops.stop_gradient(scale))
