"""How `TimeDistributed` reads as rows times a kernel: once for all steps."""

import types
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, own_call, with_attributes
from keras_isaac.layers.convolution import channels_last, conditioned_on_patches, window_of
from keras_isaac.layers.patches import patch_rows
from keras_isaac.layers.products import ConditioningOf, conditioned_matrices, conditioning_in_force, main_kernels

_CONVOLUTIONS = [layer.call for layer in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)]


class TimeDistributedAdapter:
    """`TimeDistributed` of `Dense` or of a convolution: the rows of all steps are rows of one kernel."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The wrapped layer's kernel, or LoRA's factors."""
        return main_kernels(layer.layer) if type(layer.layer).call in (keras.layers.Dense.call, *_CONVOLUTIONS) else []

    def call(
        self, layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> Any:
        """The layer's own `call`, with the kernels of the wrapped layer conditioned."""
        kernels, wrapped, values = self.kernels(layer), layer.layer, []
        conditioning = conditioning_in_force(kernels, conditioning_of)
        if type(wrapped).call is keras.layers.Dense.call:
            rows = sampled_rows(inputs, conditioning, _mask_of_positions(mask, inputs, len(inputs.shape) - 1))
            matrices = [ops.convert_to_tensor(kernel) for kernel in kernels]
            values = list(zip(kernels, conditioned_matrices(kernels, matrices, conditioning_of, rows), strict=True))
        elif None not in (images := channels_last(wrapped, inputs, axis=2)).shape[2:-1]:
            # TensorFlow may trace a step for images of any size. There is no grid of patches then, and the gradient is plain.
            # A step is valid if any position in it is.
            rows = patch_rows(images, conditioning, _mask_of_positions(mask, images, 2), window_of(wrapped))
            values = conditioned_on_patches(kernels, conditioning_of, rows, wrapped.groups)
        # The wrapped layer may be captured itself, and would condition its kernels again at every step.
        own = types.MethodType(own_call(wrapped), wrapped)
        with with_attributes(wrapped, call=own, quantized_call=own):
            return call_with(layer, values, inputs, training=training, mask=mask)


def _mask_of_positions(mask: Any, inputs: Any, num_axes: int) -> Any:
    """Returns a mask of the first `num_axes` axes of `inputs`; the mask given may have fewer or more."""
    sizes = [] if mask is None else zip(mask.shape[:2], inputs.shape[:2], strict=False)
    if mask is None or len(mask.shape) < 2 or any(None not in pair and pair[0] != pair[1] for pair in sizes):
        # The layer's own call refuses a mask that does not fit.
        return None
    if len(mask.shape) > num_axes:
        mask = ops.any(mask, axis=tuple(range(num_axes, len(mask.shape))))
    mask = ops.reshape(mask, (*ops.shape(mask), *[1] * (num_axes - len(mask.shape))))
    return ops.broadcast_to(mask, ops.shape(inputs)[:num_axes])
