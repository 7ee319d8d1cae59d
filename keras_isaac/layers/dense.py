"""How `Dense` reads as rows times a kernel."""

from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, own_call, quantization
from keras_isaac.layers.lora import conditioned_factors, has_lora, main_kernels
from keras_isaac.layers.products import bias_and_activation, conditioned, is_sparse, note_sparse, product


class DenseAdapter:
    """`Dense`: every position of the input is a row; the kernel is `[in, out]`."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's factors."""
        return main_kernels(layer)

    @staticmethod
    def call(layer, conditioning_of, inputs, training=None):
        """`Dense.call`."""
        kernels = DenseAdapter.kernels(layer)
        if is_sparse(inputs):
            note_sparse(layer, map(conditioning_of, kernels))
            return own_call(layer)(layer, inputs, training=training)
        values = [ops.convert_to_tensor(kernel) for kernel in kernels]
        (conditioning, *_) = filter(None, map(conditioning_of, kernels))
        if quantization(layer) is None and not has_lora(layer):
            return bias_and_activation(layer, product(inputs, values[0], conditioning, mask_of(inputs)))
        rows = sampled_rows(inputs, conditioning, mask_of(inputs))
        if has_lora(layer):
            values = conditioned_factors(kernels, values, conditioning_of, rows)
        else:
            values = [conditioned(values[0], conditioning, rows)]
        return call_with(layer, zip(kernels, values, strict=True), inputs, training=training)
