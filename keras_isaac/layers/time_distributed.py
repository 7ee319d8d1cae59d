"""How `TimeDistributed` reads as rows times a kernel: once for all steps."""

import math
import types
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, own_call, with_attributes
from keras_isaac.layers.convolution import channels_last, kernel_of, matrix_of, rows_of_groups
from keras_isaac.layers.lora import conditioned_factors, has_lora, main_kernels
from keras_isaac.layers.patches import patch_rows
from keras_isaac.layers.products import ConditioningOf, conditioned, conditioning_in_force
from keras_isaac.scope import Conditioning

_CONVOLUTIONS = {layer.call for layer in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)}


class TimeDistributedAdapter:
    """`TimeDistributed` of `Dense` or of a convolution: the rows of all steps are rows of one kernel."""

    @staticmethod
    def kernels(layer: Any) -> list[keras.Variable]:
        """The wrapped layer's kernel, or LoRA's factors: of a convolution, the first."""
        wrapped = layer.layer
        if type(wrapped).call is keras.layers.Dense.call:
            return main_kernels(wrapped)
        return main_kernels(wrapped)[:1] if type(wrapped).call in _CONVOLUTIONS else []

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The layer's own `call`, with the kernels of the wrapped layer conditioned."""
        kernels, wrapped = TimeDistributedAdapter.kernels(layer), layer.layer
        values: Sequence[Any] = [ops.convert_to_tensor(kernel) for kernel in kernels]
        conditioning = conditioning_in_force(kernels, conditioning_of)
        if type(wrapped).call is keras.layers.Dense.call:
            rows = sampled_rows(inputs, conditioning, _mask_of_positions(mask, inputs, len(inputs.shape) - 1))
            if has_lora(wrapped):
                values = conditioned_factors(kernels, values, conditioning_of, rows)
            else:
                values = [conditioned(values[0], conditioning, rows)]
        else:
            images = channels_last(wrapped, inputs, axis=2)
            values = [_conditioned_convolution(wrapped, values[0], conditioning, images, mask)]
        # The wrapped layer may be captured itself, and would condition its kernels again at every step.
        own = types.MethodType(own_call(wrapped), wrapped)
        with with_attributes(wrapped, call=own, quantized_call=own):
            return call_with(layer, zip(kernels, values, strict=True), inputs, training=training, mask=mask)


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


def _conditioned_convolution(layer: Any, kernel: Any, conditioning: Conditioning, inputs: Any, mask: Any) -> Any:
    """Returns the kernel of a convolution that runs at each step, conditioned on inputs with the channels last."""
    if None in inputs.shape[2:-1]:
        # TensorFlow may trace a step for images of any size. There is no grid of patches then, and the gradient is plain.
        return kernel
    # A step is valid if any position in it is.
    mask = _mask_of_positions(mask, inputs, 2)
    rows = patch_rows(inputs, conditioning, mask, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
    size, num_in = math.prod(kernel.shape[:-2]), kernel.shape[-2]
    rows = rows_of_groups(rows, size, num_in, layer.groups)
    matrix = conditioned(matrix_of(kernel, size * num_in, layer.groups), conditioning, rows)
    return kernel_of(matrix, kernel.shape, layer.groups)
