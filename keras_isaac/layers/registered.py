"""How a layer of the user's reads as rows times a kernel."""

import math

from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.layers.calls import call_with, conditioned, mask_of


class RegisteredAdapter:
    """A layer of the user's: rows by its function, the rest by its own `call`."""

    def __init__(self, name, kernel, rows):
        self.name, self.kernel, self.rows = name, kernel, rows

    def kernels(self, layer):
        """The named variable."""
        return [getattr(layer, self.kernel)]

    def call(self, layer, conditioning_of, inputs, *args, **kwargs):
        """The layer's own `call`."""
        (kernel,) = self.kernels(layer)
        value, rows = ops.convert_to_tensor(kernel), self.rows(layer, inputs)
        if math.prod(value.shape) % rows.shape[-1]:
            raise ValueError(
                f"The rows registered for {self.name} layer '{layer.path}' do not fit its kernel: the last axis of the rows "
                "must be the product of the kernel's first axes. "
                f"Received: rows of shape {tuple(rows.shape)}, `{self.kernel}` of shape {tuple(value.shape)}"
            )
        matrix = ops.reshape(value, (rows.shape[-1], -1))
        conditioning = conditioning_of(kernel)
        matrix = conditioned(matrix, conditioning, sampled_rows(rows, conditioning, mask_of(inputs)))
        return call_with(layer, [(kernel, ops.reshape(matrix, value.shape))], inputs, *args, **kwargs)
