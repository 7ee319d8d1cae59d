"""How `Dense` reads as rows times a kernel."""

from typing import Any

from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, own_call
from keras_isaac.layers.lora import conditioned_factors, main_kernels
from keras_isaac.layers.products import (
    ConditioningOf,
    bias_and_activation,
    conditioned,
    conditioning_in_force,
    is_sparse,
    note_sparse,
    product,
)


class DenseAdapter:
    """`Dense`: every position of the input is a row; the kernel is `[in, out]`."""

    kernels = staticmethod(main_kernels)

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None) -> Any:
        """`Dense.call`."""
        kernels = main_kernels(layer)
        if is_sparse(inputs):
            note_sparse(layer, map(conditioning_of, kernels))
            return own_call(layer)(layer, inputs, training=training)
        value, mask = ops.convert_to_tensor(kernels[0]), mask_of(inputs)
        conditioning = conditioning_in_force(kernels, conditioning_of)
        if len(kernels) == 1 and getattr(layer, "quantization_mode", None) is None:
            return bias_and_activation(layer, product(inputs, value, conditioning, mask))
        rows = sampled_rows(inputs, conditioning, mask)
        if len(kernels) == 1:
            values: tuple[Any, ...] = (conditioned(value, conditioning, rows),)
        else:
            values = conditioned_factors(kernels, (value, ops.convert_to_tensor(kernels[1])), conditioning_of, rows)
        return call_with(layer, zip(kernels, values, strict=True), inputs, training=training)
