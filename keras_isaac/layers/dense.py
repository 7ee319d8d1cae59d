"""How `Dense` reads as rows times a kernel."""

from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.layers.calls import as_dense, bias_and_activation, call_with, conditioned, mask_of, product


class DenseAdapter:
    """`Dense`: every position of the input is a row; the kernel is `[in, out]`."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor, which is what meets the inputs then."""
        return [layer.lora_kernel_a if layer.lora_enabled else layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs, training=None):
        """`Dense.call`."""
        (kernel,) = DenseAdapter.kernels(layer)
        conditioning, value = conditioning_of(kernel), ops.convert_to_tensor(kernel)
        if layer.lora_enabled:
            rows = sampled_rows(as_dense(inputs), conditioning, mask_of(inputs))
            return call_with(layer, [(kernel, conditioned(value, conditioning, rows))], inputs, training=training)
        return bias_and_activation(layer, product(inputs, value, conditioning, mask_of(inputs)))
