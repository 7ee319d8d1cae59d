"""How convolutions read as rows times a kernel: adapters in the sense of `layers.py`."""

import keras
from keras import ops

from keras_isaac.calls import bias_and_activation, call_with, conditioned, conditioned_by_outputs
from keras_isaac.rows import patches, representatives


class ConvAdapter:
    """`Conv1D/2D/3D` (and `DepthwiseConv`): a row is the patch that the kernel meets; feature groups are groups."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor."""
        return [layer.lora_kernel_a if getattr(layer, "lora_enabled", False) else layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call`, its kernel conditioned on patches."""
        (kernel,) = ConvAdapter.kernels(layer)
        depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
        # What comes of LoRA's first factor is not the layer's output.
        output_shape = layer.compute_output_shape(inputs.shape) if kernel is layer.kernel else None
        value, conditioning = ops.convert_to_tensor(kernel), conditioning_of(kernel)
        value, tap = _conditioned_convolution(layer, value, conditioning, inputs, output_shape, depthwise)
        return call_with(layer, [(kernel, value)], inputs, tap=tap)


class SeparableConvAdapter:
    """`SeparableConv1D/2D`: a depthwise convolution, and a product of what comes out of it at each position."""

    @staticmethod
    def kernels(layer):
        """Both kernels."""
        return [layer.depthwise_kernel, layer.pointwise_kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call` in its two steps."""
        depthwise, pointwise = (ops.convert_to_tensor(kernel) for kernel in SeparableConvAdapter.kernels(layer))
        tap, conditioning = None, conditioning_of(layer.depthwise_kernel)
        if conditioning is not None:
            output_shape = list(layer.compute_output_shape(inputs.shape))
            output_shape[_channel_axis(layer)] = pointwise.shape[-2]
            depthwise, tap = _conditioned_convolution(layer, depthwise, conditioning, inputs, output_shape, depthwise=True)
        options = {"padding": layer.padding, "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
        strides = layer.strides if layer.data_format == "channels_last" else layer.strides[-layer.rank :]
        inputs = ops.depthwise_conv(inputs, depthwise, strides=strides, **options)
        inputs = inputs if tap is None else tap(inputs)
        tap, conditioning = None, conditioning_of(layer.pointwise_kernel)
        if conditioning is not None:
            matrix = ops.reshape(pointwise, pointwise.shape[-2:])
            matrix = conditioned(matrix, conditioning, representatives(_channels_last(layer, inputs), conditioning))
            output_shape = list(ops.shape(inputs))
            output_shape[_channel_axis(layer)] = pointwise.shape[-1]
            matrix, tap = conditioned_by_outputs(
                matrix, conditioning, output_shape, lambda outputs: _channels_last(layer, outputs)
            )
            pointwise = ops.reshape(matrix, pointwise.shape)
        outputs = ops.conv(inputs, pointwise, strides=1, padding="valid", data_format=layer.data_format)
        return bias_and_activation(layer, outputs if tap is None else tap(outputs), layer.data_format)


class ConvTransposeAdapter:
    """`Conv1D/2D/3DTranspose`: every pixel is a row, whose product is a patch of the output (which is not conditioned)."""

    @staticmethod
    def kernels(layer):
        """The kernel, `[*kernel_size, out, in]`."""
        return [layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call`, its kernel conditioned on pixels."""
        value = ops.convert_to_tensor(layer.kernel)
        rows = representatives(_channels_last(layer, inputs), conditioning_of(layer.kernel))
        matrix = ops.transpose(ops.reshape(value, (-1, value.shape[-1])))
        matrix = conditioned(matrix, conditioning_of(layer.kernel), rows)
        return call_with(layer, [(layer.kernel, ops.reshape(ops.transpose(matrix), value.shape))], inputs)


def _conditioned_convolution(layer, kernel, conditioning, inputs, output_shape, depthwise):
    """Returns the kernel, its gradient conditioned on patches and, given an `output_shape`, on the outputs; and a tap.

    The kernel is `[*kernel_size, in of a group, out of all groups]`; if depthwise, `[*kernel_size, channels, multiplier]`,
    where every channel is a group.
    """
    inputs = _channels_last(layer, inputs)
    if None in inputs.shape[1:-1]:
        # TensorFlow may trace a step for images of any size. There is no grid of patches then, and the gradient is plain.
        return kernel, None
    rows = patches(inputs, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, conditioning)
    size = rows.shape[1]
    groups = inputs.shape[-1] if depthwise else layer.groups
    num_in = inputs.shape[-1] // groups
    num_groups = int(groups > 1)
    if num_groups:
        rows = ops.transpose(ops.reshape(rows, (-1, size, groups, num_in)), (2, 0, 1, 3))
        rows = ops.reshape(rows, (groups, -1, size * num_in))
        matrix = ops.swapaxes(ops.reshape(kernel, (size * num_in, groups, -1)), 0, 1)
    else:
        rows, matrix = ops.reshape(rows, (-1, size * num_in)), ops.reshape(kernel, (size * num_in, -1))
    matrix, tap = conditioned(matrix, conditioning, (rows, None)), None
    if output_shape is not None:

        def rows_of(outputs):
            outputs = _channels_last(layer, outputs)
            if not num_groups:
                return outputs
            outputs = ops.reshape(outputs, (*ops.shape(outputs)[:-1], groups, outputs.shape[-1] // groups))
            return ops.moveaxis(outputs, -2, 0)

        output_shape = (ops.shape(inputs)[0], *output_shape[1:])
        matrix, tap = conditioned_by_outputs(matrix, conditioning, output_shape, rows_of, num_groups=num_groups)
    matrix = ops.swapaxes(matrix, 0, 1) if num_groups else matrix
    return ops.reshape(matrix, kernel.shape), tap


def _channels_last(layer, inputs):
    return inputs if layer.data_format == "channels_last" else ops.moveaxis(inputs, 1, -1)


def _channel_axis(layer):
    return -1 if layer.data_format == "channels_last" else 1
