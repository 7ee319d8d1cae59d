"""How convolutions read as rows times a kernel."""

import math

import keras
from keras import ops

from keras_isaac.curvature.rows import Rows, patches, positions, sampled_rows
from keras_isaac.layers.calls import Outputs, bias_and_activation, call_with, conditioned


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
        value, conditioning = ops.convert_to_tensor(kernel), conditioning_of(kernel)
        # What comes of LoRA's first factor is not the layer's output.
        value, carrier = _conditioned_convolution(layer, value, conditioning, inputs, kernel is layer.kernel, depthwise)
        if carrier is None:
            return call_with(layer, [(kernel, value)], inputs)
        # The carrier is added before the activation.
        return bias_and_activation(layer, _convolve(layer, inputs, value, depthwise) + carrier, layer.data_format)


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
        carrier, conditioning = None, conditioning_of(layer.depthwise_kernel)
        if conditioning is not None:
            depthwise, carrier = _conditioned_convolution(layer, depthwise, conditioning, inputs, True, depthwise=True)
        options = {"padding": layer.padding, "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
        strides = layer.strides if layer.data_format == "channels_last" else layer.strides[-layer.rank :]
        inputs = ops.depthwise_conv(inputs, depthwise, strides=strides, **options)
        inputs = inputs if carrier is None else inputs + carrier
        carrier, conditioning = None, conditioning_of(layer.pointwise_kernel)
        if conditioning is not None:
            output_shape = list(ops.shape(inputs))
            output_shape[_channel_axis(layer)] = pointwise.shape[-1]
            outputs = Outputs(tuple(output_shape), lambda outputs: _channels_last(layer, outputs))
            rows = sampled_rows(_channels_last(layer, inputs), conditioning)
            matrix, carrier = conditioned(ops.reshape(pointwise, pointwise.shape[-2:]), conditioning, rows, outputs)
            pointwise = ops.reshape(matrix, pointwise.shape)
        outputs = ops.conv(inputs, pointwise, strides=1, padding="valid", data_format=layer.data_format)
        return bias_and_activation(layer, outputs if carrier is None else outputs + carrier, layer.data_format)


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
        conditioning = conditioning_of(layer.kernel)
        rows = sampled_rows(_channels_last(layer, inputs), conditioning)
        # [*kernel_size, out, in] -> [in, kernel positions * out]
        matrix = ops.transpose(ops.reshape(value, (-1, value.shape[-1])))
        matrix = conditioned(matrix, conditioning, rows)
        return call_with(layer, [(layer.kernel, ops.reshape(ops.transpose(matrix), value.shape))], inputs)


def _conditioned_convolution(layer, kernel, conditioning, inputs, makes_outputs, depthwise):
    """Returns the kernel, its gradient conditioned on patches and, if it `makes_outputs`, on those; and a carrier.

    The kernel is `[*kernel_size, in of a group, out of all groups]`; if depthwise, `[*kernel_size, channels, multiplier]`,
    where every channel is a group.
    """
    inputs = ops.stop_gradient(_channels_last(layer, inputs))
    rows = patches(inputs, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, conditioning)
    size = rows.values.shape[1]
    groups = inputs.shape[-1] if depthwise else layer.groups
    num_in = inputs.shape[-1] // groups
    num_groups = int(groups > 1)
    if num_groups:
        # [rows, positions, groups * in] -> [groups, rows, positions * in]
        values = ops.transpose(ops.reshape(rows.values, (-1, size, groups, num_in)), (2, 0, 1, 3))
        values = ops.reshape(values, (groups, -1, size * num_in))
        # [*kernel_size, in, groups * out] -> [groups, positions * in, out]
        matrix = ops.swapaxes(ops.reshape(kernel, (size * num_in, groups, -1)), 0, 1)
    else:
        values, matrix = ops.reshape(rows.values, (-1, size * num_in)), ops.reshape(kernel, (size * num_in, -1))
    rows = Rows(values, None, rows.num_represented)

    def rows_of(outputs):
        outputs = _channels_last(layer, outputs)
        if not num_groups:
            return outputs
        # [samples, *positions, groups * out] -> [groups, samples, *positions, out]
        outputs = ops.reshape(outputs, (*ops.shape(outputs)[:-1], groups, outputs.shape[-1] // groups))
        return ops.moveaxis(outputs, -2, 0)

    outputs = None
    if makes_outputs:
        num_samples, *lengths, _ = ops.shape(inputs)
        _, lengths = positions(lengths, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
        num_outputs = math.prod(kernel.shape[-2:]) if depthwise else kernel.shape[-1]
        output_shape = [num_samples, *lengths]
        output_shape.insert(1 if layer.data_format == "channels_first" else len(output_shape), num_outputs)
        outputs = Outputs(tuple(output_shape), rows_of, num_groups=num_groups)
    result = conditioned(matrix, conditioning, rows, outputs)
    matrix, carrier = (result, None) if outputs is None else result
    matrix = ops.swapaxes(matrix, 0, 1) if num_groups else matrix
    return ops.reshape(matrix, kernel.shape), carrier


def _convolve(layer, inputs, kernel, depthwise):
    """Returns what the layer adds its bias to."""
    padding = layer.padding
    if padding == "causal":
        padding, before = "valid", (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
        axis = 1 if layer.data_format == "channels_last" else 2
        inputs = ops.pad(inputs, [(before, 0) if each == axis else (0, 0) for each in range(3)])
    convolve = ops.depthwise_conv if depthwise else ops.conv
    options = {"dilation_rate": layer.dilation_rate, "data_format": layer.data_format}
    return convolve(inputs, kernel, strides=layer.strides, padding=padding, **options)


def _channels_last(layer, inputs):
    return inputs if layer.data_format == "channels_last" else ops.moveaxis(inputs, 1, -1)


def _channel_axis(layer):
    return -1 if layer.data_format == "channels_last" else 1
