"""How `Dense` reads as rows times a kernel."""

from typing import Any

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

    kernels = staticmethod(main_kernels)

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None) -> Any:
        """`Dense.call`."""
        kernels = main_kernels(layer)
        if is_sparse(inputs):
            note_sparse(layer, map(conditioning_of, kernels))
            return own_call(layer)(layer, inputs, training=training)
        mask = mask_of(inputs)
        if len(kernels) == 1 and getattr(layer, "quantization_mode", None) is None:
            # The only kernel has one, or the adapter would not be called.
            conditioning: Any = conditioning_of(kernels[0])
            return bias_and_activation(layer, product(inputs, ops.convert_to_tensor(kernels[0]), conditioning, mask))
        rows = sampled_rows(inputs, conditioning_in_force(kernels, conditioning_of), mask)
        matrices = conditioned_matrices(kernels, [ops.convert_to_tensor(each) for each in kernels], conditioning_of, rows)
        return call_with(layer, zip(kernels, matrices, strict=True), inputs, training=training)
