"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table."""

import keras
from keras import ops

from keras_isaac.operations import conditioned_matmul


class DenseAdapter:
    """`Dense`: every position of the input is a row, `[batch * positions, in]`; the kernel is `[in, out]`."""

    @staticmethod
    def kernel(layer):
        """Returns the variable that is conditioned, or `None` if the layer is to be left plain."""
        # With LoRA the product's second factor is a sum of variables and no longer a kernel of its own.
        return None if layer.lora_enabled else layer.kernel

    @staticmethod
    def call(layer, damping, inputs, training=None):
        """`Dense.call` with the conditioned product."""
        kernel = ops.convert_to_tensor(layer.kernel)
        # What `matmul` promotes, the conditioned product is given: sparse inputs dense, integers in the kernel's dtype.
        inputs = ops.cast(ops.convert_to_tensor(inputs, sparse=False), kernel.dtype)
        rows = inputs if len(inputs.shape) == 2 else ops.reshape(inputs, (-1, kernel.shape[0]))
        outputs = conditioned_matmul(rows, kernel, damping)
        if len(inputs.shape) != 2:
            outputs = ops.reshape(outputs, (*ops.shape(inputs)[:-1], kernel.shape[1]))
        if layer.bias is not None:
            outputs = ops.add(outputs, layer.bias)
        if layer.activation is not None:
            outputs = layer.activation(outputs)
        return outputs


# Looked up by the function that computes the layer: a subclass with a `call` of its own is another kind of layer.
_ADAPTERS = {keras.layers.Dense.call: DenseAdapter}

SUPPORTED = ("Dense",)


def adapter_of(layer):
    """Returns the adapter of `layer`, or `None` if its kind is not supported."""
    return _ADAPTERS.get(type(layer).call)
