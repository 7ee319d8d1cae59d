"""The parts of adapters: products and kernels whose gradients are conditioned."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_isaac.backend import layout
from keras_isaac.curvature import plan
from keras_isaac.curvature.conditioner import cast
from keras_isaac.curvature.operations import conditioned, conditioned_matmul
from keras_isaac.curvature.rows import SPARSE, KernelCall, Rows, condensed, expected_total, product_rows, sampled_rows
from keras_isaac.keras_hooks import quantization
from keras_isaac.scope import Conditioning

# Returns the `Conditioning` of a kernel, or `None` where its gradient stays plain.
ConditioningOf: TypeAlias = Callable[[keras.Variable], Conditioning | None]
# Variables with the tensors that a call takes for them.
Pairs: TypeAlias = list[tuple[keras.Variable, Any]]


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
        kernel = conditioned(kernel, conditioning, sampled_rows(inputs, conditioning, mask, num_groups))
        if num_groups:
            # [groups, in, out] -> [groups, *(1 for each axis of positions), in, out]
            ones = [1] * (len(inputs.shape) - len(kernel.shape))
            kernel = ops.reshape(kernel, (*kernel.shape[:num_groups], *ones, *kernel.shape[num_groups:]))
        return ops.matmul(inputs, kernel)
    if conditioning.per_replica and layout.num_replicas() > 1:
        return _product_by_replica(inputs, kernel, conditioning, num_groups)
    if not is_shared:
        num_total = inputs.shape[-2]
        num_rows = ops.shape(inputs)[-2] if num_total is None else num_total
        rows = Rows(inputs, num_rows, num_rows, num_total)
        if num_total is not None and not plan.affords_all(num_total, *kernel.shape[-2:]):
            rows = condensed(rows, tuple(kernel.shape), conditioning)
        return conditioned_matmul(inputs, kernel, conditioning, rows, rows.values is inputs)
    shape = ops.shape(inputs)
    # All sizes are given, since `reshape` cannot infer one in an empty batch.
    matrix = ops.reshape(inputs, (*shape[:num_groups], math.prod(shape[num_groups:-1]), shape[-1]))
    rows = product_rows(matrix, conditioning, True, expected_total(inputs.shape[num_groups:-1]))
    rows = condensed(rows, tuple(kernel.shape), conditioning)
    # If the number of rows is unknown while tracing, some may be left out.
    outputs = conditioned_matmul(matrix, kernel, conditioning, rows, rows.values is matrix and matrix.shape[-2] is not None)
    return ops.reshape(outputs, (*shape[:-1], kernel.shape[-1]))


def _product_by_replica(inputs: Any, kernel: Any, conditioning: Conditioning, num_groups: int) -> Any:
    """Returns the product, each replica's rows being a group of their own, so that only its gradient crosses devices."""
    shape, num_replicas = tuple(inputs.shape), layout.num_replicas()
    rows = math.prod(shape[num_groups:-1])
    if rows % num_replicas:
        raise ValueError(
            f"Train on batches of a multiple of {num_replicas} samples: `per_replica=True` splits the rows of a layer evenly "
            f"over the {num_replicas} replicas of the distribution. Received: a batch that makes {rows} rows"
        )
    groups, output_damping = shape[:num_groups], conditioning.output_damping
    if output_damping is not None and not conditioning.relative_damping:
        # A replica's gradients are those of the mean over all replicas.
        output_damping = output_damping / num_replicas**2
    conditioning = dataclasses.replace(conditioning, per_replica=False, output_damping=output_damping)
    with layout.by_replica():
        # [(groups,) samples, *positions, in] -> [replicas, (groups,) rows of a replica, in]
        inputs = ops.reshape(inputs, (*groups, num_replicas, rows // num_replicas, shape[-1]))
        inputs = layout.with_sharding(ops.moveaxis(inputs, num_groups, 0))
        kernel = layout.with_sharding(ops.broadcast_to(kernel, (num_replicas, *kernel.shape)))
        products = product(inputs, kernel, conditioning, None, num_groups + 1)
    return ops.reshape(ops.moveaxis(products, 0, num_groups), (*shape[:-1], kernel.shape[-1]))


def is_sparse(inputs: Any) -> bool:
    """Returns whether inputs are a sparse tensor: of a functional model, of TensorFlow or of JAX."""
    return getattr(inputs, "sparse", False) is True or hasattr(inputs, "dense_shape") or hasattr(inputs, "nse")


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


def bias_and_activation(layer: keras.Layer, outputs: Any, data_format: str = "channels_last") -> Any:
    """Returns `outputs` with the layer's bias added and its activation applied."""
    if layer.bias is not None:
        bias = layer.bias
        if data_format == "channels_first":
            bias = ops.reshape(bias, (1, -1, *(1 for _ in outputs.shape[2:])))
        outputs = ops.add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)


# LoRA, which several layers have: the two factors of their kernel are conditioned instead of it.


def has_lora(layer: keras.Layer) -> bool:
    """Whether the layer computes by LoRA's factors. Layers that Keras quantizes by other modes do not use them."""
    return getattr(layer, "lora_enabled", False) and quantization(layer) in (None, "int8", "int4")


def main_kernels(layer: Any, name: str = "kernel") -> list[keras.Variable]:
    """Returns the kernel of a layer, or LoRA's two factors; of a quantized layer, those that train."""
    if getattr(layer, "lora_enabled", False) and has_lora(layer):
        return [getattr(layer, f"lora_{name}_{factor}") for factor in "ab"]
    # Float8 multiplies a float kernel, rounded. Other modes have no kernel that trains.
    return [getattr(layer, name)] if getattr(layer, "quantization_mode", None) in (None, "float8") else []


def conditioned_matrices(
    kernels: Sequence[keras.Variable], matrices: Sequence[Any], conditioning_of: ConditioningOf, rows: Rows
) -> list[Any]:
    """Returns the matrix of a kernel, or those of LoRA's factors; the gradients of those that train are conditioned.

    The inputs of the second factor are the rows' products with the first, a row for each group and each output of the first.

    Args:
        kernels: the variable, or the two.
        matrices: their tensors, `[(groups,) in, out]`; or `[(groups,) in, outputs * rank]` and `[rank, out]`; or the second
            `[groups, rank, out]`, where each group multiplies as many of the rows, in their order.
        conditioning_of: function of a kernel, as in the adapters.
        rows: `Rows` `[(groups,) rows, in]`, the inputs of the first.
    """
    (first, *others), conditionings = matrices, [conditioning_of(kernel) for kernel in kernels]
    if others and len(others[0].shape) == 2:
        # The inputs of the second factor can be computed from sums of rows, too, but not from sums over groups.
        rows = condensed(rows, tuple(first.shape), conditioning_in_force(kernels, conditioning_of))
    if others and conditionings[1] is not None:
        others = [conditioned(others[0], conditionings[1], _rows_of_second(rows, first, others[0]))]
    if conditionings[0] is not None:
        first = conditioned(first, conditionings[0], rows)
    return [first, *others]


def _rows_of_second(rows: Rows, first: Any, second: Any) -> Rows:
    values, first = ops.stop_gradient(rows.values), ops.stop_gradient(first)
    values = ops.cast(values, first.dtype) @ first
    *groups, rank, _ = second.shape
    times = math.prod(values.shape[:-2]) * (values.shape[-1] // rank)

    def count(number: Any) -> Any:
        # The number for each group; the mean over the groups if their masks differ.
        if isinstance(number, int) or len(number.shape) == 0:
            return number * times // math.prod(groups)
        return ops.reshape(ops.mean(number) * times, (1, 1)) / math.prod(groups)

    num_total = None if rows.num_total is None else rows.num_total * times // math.prod(groups)
    values = ops.reshape(values, (*groups, -1, rank))
    return Rows(values, count(rows.num_sampled), count(rows.num_valid), num_total, rows.is_shared)
