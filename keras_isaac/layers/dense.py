"""How `Dense` reads as rows times a kernel."""

from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, own_call
from keras_isaac.layers.products import (
    ConditioningOf,
    bias_and_activation,
    conditioned_matrices,
    conditioning_in_force,
    is_sparse,
    main_kernels,
    note_sparse,
    product,
)


class DenseAdapter:
    """`Dense`: every position of the input is a row; the kernel is `[in, out]`."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The kernel, or LoRA's factors."""
        return main_kernels(layer)

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None) -> Any:
        """`Dense.call`."""
        kernels = main_kernels(layer)
        if is_sparse(inputs):
            note_sparse(layer, map(conditioning_of, kernels))
            return own_call(layer)(layer, inputs, training=training)
        conditioning, mask = conditioning_in_force(kernels, conditioning_of), mask_of(inputs)
        matrices = [ops.convert_to_tensor(kernel) for kernel in kernels]
        if len(kernels) == 1 and getattr(layer, "quantization_mode", None) is None:
            return bias_and_activation(layer, product(inputs, matrices[0], conditioning, mask))
        matrices = conditioned_matrices(kernels, matrices, conditioning_of, sampled_rows(inputs, conditioning, mask))
        return call_with(layer, zip(kernels, matrices, strict=True), inputs, training=training)
