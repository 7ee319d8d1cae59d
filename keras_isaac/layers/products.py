"""The parts of adapters: products and kernels whose gradients are conditioned."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_isaac.backend import layout
from keras_isaac.curvature import operations, plan
from keras_isaac.curvature.conditioner import cast
from keras_isaac.curvature.record import SPARSE, KernelCall
from keras_isaac.curvature.rows import Rows, condensed, expected_total, num_read, product_rows, sampled_rows
from keras_isaac.scope import Conditioning

# Returns the `Conditioning` of a kernel, or `None` where its gradient stays plain.
ConditioningOf: TypeAlias = Callable[[keras.Variable], Conditioning | None]


def conditioned(matrix: Any, conditioning: Conditioning, rows: Rows) -> Any:
    """Returns a kernel; its gradient is conditioned on rows when the backward pass has finished it.

    Args:
        matrix: tensor `[(groups,) in, out]`, the kernel.
        conditioning: the `Conditioning` in force.
        rows: `Rows` of the layer's inputs.
    """
    conditioning.refuse_outputs()
    rows = condensed(rows, tuple(matrix.shape), conditioning)
    call = KernelCall(tuple(matrix.shape), rows)
    conditioning.note(call)
    return operations.conditioned_kernel(matrix, rows, plan.choose(call), conditioning)


def conditioning_in_force(kernels: Iterable[keras.Variable], conditioning_of: ConditioningOf) -> Conditioning:
    """Returns the `Conditioning` of the first kernel that has one. An adapter is called only if one of its kernels does."""
    return next(filter(None, map(conditioning_of, kernels)))


def product(inputs: Any, kernel: Any, conditioning: Conditioning, mask: Any = None, num_groups: int = 0) -> Any:
    """Returns `inputs @ kernel`, the kernel conditioned on the positions of the inputs.

    Args:
        inputs: tensor `[(groups,) samples, *positions, in]`.
        kernel: tensor `[(groups,) in, out]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[(groups,) samples, *positions]`, with or without the groups, true where a position is valid, or `None`.
        num_groups: 1 if there is an axis of groups, else 0.
    """
    if inputs.dtype != kernel.dtype:
        # `matmul` would promote integers.
        inputs = cast(ops.convert_to_tensor(inputs), kernel.dtype)
    is_shared = len(inputs.shape) > num_groups + 2
    if mask is not None or (is_shared and conditioning.weight_sharing == "reduce"):
        rows = sampled_rows(inputs, conditioning, mask, num_groups)
        return ops.matmul(inputs, conditioned(kernel, conditioning, rows))
    if conditioning.per_replica and layout.num_replicas() > 1:
        return _product_by_replica(inputs, kernel, conditioning, num_groups)
    if not is_shared:
        num_rows = inputs.shape[-2]
        rows = (
            product_rows(inputs, conditioning, False, num_rows)
            if num_rows is None
            else Rows(inputs, num_rows, num_rows, num_rows)
        )
        return _conditioned_product(inputs, kernel, conditioning, rows, is_whole=True)
    matrix = _as_matrix(inputs, num_groups)
    rows = product_rows(matrix, conditioning, True, expected_total(inputs.shape[num_groups:-1]))
    rows = condensed(rows, tuple(kernel.shape), conditioning)
    # If the number of rows is unknown while tracing, some may be left out.
    outputs = _conditioned_product(matrix, kernel, conditioning, rows, rows.values is matrix and matrix.shape[-2] is not None)
    return ops.reshape(outputs, (*ops.shape(inputs)[:-1], kernel.shape[-1]))


def _as_matrix(inputs: Any, num_groups: int) -> Any:
    """Returns `[(groups,) rows, in]` of `[(groups,) samples, *positions, in]`."""
    shape = ops.shape(inputs)
    # All sizes are given, since `reshape` cannot infer one in an empty batch.
    return ops.reshape(inputs, (*shape[:num_groups], math.prod(shape[num_groups:-1]), shape[-1]))


def _conditioned_product(matrix: Any, kernel: Any, conditioning: Conditioning, rows: Rows, is_whole: bool) -> Any:
    """Returns `matrix @ kernel`, conditioned on rows of the matrix, or on all if `is_whole`."""
    # The norm is known only once the gradient is finished.
    has_product = is_whole and not (conditioning.preserve_norm and conditioning.output_damping is None)
    num_output_rows = None
    if conditioning.output_damping is not None:
        num_output_rows = _num_output_rows(matrix, tuple(kernel.shape), conditioning, rows)
    call = KernelCall(tuple(kernel.shape), rows, has_product, num_output_rows)
    if conditioning.record is not None:
        conditioning.note(call)
    return operations.conditioned_matmul(matrix, kernel, rows, has_product, plan.choose(call), conditioning)


def _num_output_rows(matrix: Any, shape: tuple[int, ...], conditioning: Conditioning, rows: Rows) -> int | None:
    num_rows = matrix.shape[-2]
    if not rows.is_shared or num_rows is None:
        return num_rows
    num_sums = plan.num_kept(rows.num_total, shape[-1], shape[-2], conditioning.max_rows)
    return min(num_rows, num_read(conditioning), num_sums)


def _product_by_replica(inputs: Any, kernel: Any, conditioning: Conditioning, num_groups: int) -> Any:
    """Returns the product, each replica's rows being a group of their own, so that only its gradient crosses devices."""
    shape, num_replicas = tuple(inputs.shape), layout.num_replicas()
    rows = math.prod(shape[num_groups:-1])
    if rows % num_replicas:
        raise ValueError(
            f"Train on batches of a multiple of {num_replicas} samples: `per_replica=True` splits the rows of a layer evenly "
            f"over the {num_replicas} replicas of the distribution. Received: a batch that makes {rows} rows"
        )
    groups = shape[:num_groups]
    with layout.by_replica():
        # [(groups,) samples, *positions, in] -> [replicas, (groups,) rows of a replica, in]
        inputs = ops.reshape(inputs, (*groups, num_replicas, rows // num_replicas, shape[-1]))
        inputs = layout.with_sharding(ops.moveaxis(inputs, num_groups, 0))
        kernel = layout.with_sharding(ops.broadcast_to(kernel, (num_replicas, *kernel.shape)))
        products = product(inputs, kernel, conditioning.for_one_replica(num_replicas), None, num_groups + 1)
    return ops.reshape(ops.moveaxis(products, 0, num_groups), (*shape[:-1], kernel.shape[-1]))


def is_sparse(inputs: Any) -> bool:
    """Returns whether inputs are a sparse tensor: of a backend, where it has `indices`, or of a functional model."""
    indices = getattr(inputs, "indices", None)
    # A dense tensor of PyTorch has a method of this name.
    return getattr(inputs, "sparse", False) is True or (indices is not None and not callable(indices))


def note_sparse(layer: keras.Layer, conditionings: Iterable[Conditioning | None]) -> None:
    """Warns, and records with each `Conditioning`, that sparse inputs leave this call of a layer plain.

    Conditioning would need the rows as a dense matrix, which takes many times as long as the sparse product.
    """
    warnings.warn(
        f"{type(layer).__name__} layer '{layer.path}' trains with its plain gradient, because its inputs are sparse. To "
        "condition it, pass dense inputs. To silence this warning, pass the layer to `capture_inputs(..., exclude=)`.",
        stacklevel=2,
    )
    for conditioning in filter(None, conditionings):
        conditioning.note(KernelCall((), reason=SPARSE))


def as_dense(inputs: Any) -> Any:
    """Returns a tensor, dense if it was sparse."""
    return ops.convert_to_tensor(inputs, sparse=False)


def bias_and_activation(layer: keras.Layer, outputs: Any, data_format: str = "channels_last") -> Any:
    """Returns `outputs` with the layer's bias added and its activation applied."""
    if layer.bias is not None:
        bias = layer.bias
        if data_format == "channels_first":
            bias = ops.reshape(bias, (1, -1, *(1 for _ in outputs.shape[2:])))
        outputs = ops.add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)
