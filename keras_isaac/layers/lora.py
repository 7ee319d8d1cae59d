"""LoRA, which several layers have: their kernel's two factors, conditioned instead of the kernel."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import Rows, condensed
from keras_isaac.keras_hooks import quantization
from keras_isaac.layers.products import ConditioningOf, conditioned, conditioning_in_force


def has_lora(layer: keras.Layer) -> bool:
    """Whether the layer computes by LoRA's factors. Layers that Keras quantizes by other modes do not use them."""
    return getattr(layer, "lora_enabled", False) and quantization(layer) in (None, "int8", "int4")


def main_kernels(layer: Any) -> list[keras.Variable]:
    """Returns the kernel of a layer, or LoRA's two factors; of a quantized layer, those that train."""
    if getattr(layer, "lora_enabled", False) and has_lora(layer):
        return [layer.lora_kernel_a, layer.lora_kernel_b]
    # Float8 multiplies a float kernel, rounded. Other modes have no kernel that trains.
    return [layer.kernel] if getattr(layer, "quantization_mode", None) in (None, "float8") else []


def conditioned_factors(
    kernels: Sequence[keras.Variable],
    matrices: Sequence[Any],
    conditioning_of: ConditioningOf,
    rows: Rows,
) -> tuple[Any, Any]:
    """Returns the matrices of LoRA's factors; the gradients of those that train are conditioned.

    The inputs of the second factor are the rows' products with the first, a row for each group and each output of the first.

    Args:
        kernels: the two variables.
        matrices: their tensors, `[(groups,) in, outputs * rank]` and `[rank, out]`; or the second `[groups, rank, out]`, where
            each group multiplies as many of the rows, in their order.
        conditioning_of: function of a kernel, as in the adapters.
        rows: `Rows` `[(groups,) rows, in]`, the inputs of the first factor.
    """
    (first, second), conditionings = matrices, [conditioning_of(kernel) for kernel in kernels]
    if len(second.shape) == 2:
        # The inputs of the second factor can be computed from sums of rows, too, but not from sums over groups.
        rows = condensed(rows, tuple(first.shape), conditioning_in_force(kernels, conditioning_of))
    if conditionings[1] is not None:
        second = conditioned(second, conditionings[1], _rows_of_second(rows, first, second))
    if conditionings[0] is not None:
        first = conditioned(first, conditionings[0], rows)
    return first, second


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
