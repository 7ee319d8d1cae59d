"""How convolutions read as rows times a kernel."""

import math

import keras
from keras import ops

from keras_isaac.curvature.rows import Rows, patches, positions, sampled_rows
from keras_isaac.layers.calls import (
    Outputs,
    bias_and_activation,
    call_with,
    conditioned,
    conditioned_factors,
    has_lora,
    main_kernels,
)


class ConvAdapter:
    """`Conv1D/2D/3D` (and `DepthwiseConv`): a row is the patch that the kernel meets; feature groups are groups."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's factors."""
        return main_kernels(layer)

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call`, its kernel conditioned on patches."""
        if has_lora(layer):
            return _call_with_factors(layer, conditioning_of, inputs)
        depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
        value, conditioning = ops.convert_to_tensor(layer.kernel), conditioning_of(layer.kernel)
        value, carrier = _conditioned_convolution(layer, value, conditioning, inputs, depthwise)
        if carrier is None:
            return call_with(layer, [(layer.kernel, value)], inputs)
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
            depthwise, carrier = _conditioned_convolution(layer, depthwise, conditioning, inputs, depthwise=True)
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


def _call_with_factors(layer, conditioning_of, inputs):
    """Returns the layer's own `call`, with LoRA's factors `[*kernel_size, in of a group, rank]`, `[rank, out]` conditioned."""
    kernels = ConvAdapter.kernels(layer)
    (conditioning, *_) = filter(None, map(conditioning_of, kernels))
    rows = _patches_of_groups(layer, _channels_last(layer, inputs), conditioning, layer.groups)
    a, b = (ops.convert_to_tensor(kernel) for kernel in kernels)
    first, second = ops.reshape(a, (-1, a.shape[-1])), b
    if layer.groups > 1:
        # One first factor meets the patches of all groups. What comes of each group meets its own columns of the second.
        num_represented = None if rows.num_represented is None else rows.num_represented * layer.groups
        rows = Rows(ops.reshape(rows.values, (-1, rows.values.shape[-1])), None, num_represented)
        second = matrix_of(b, b.shape[0], layer.groups)
    first, second = conditioned_factors(kernels, (first, second), conditioning_of, rows)
    second = kernel_of(second, b.shape, layer.groups)
    return call_with(layer, zip(kernels, (ops.reshape(first, a.shape), second), strict=True), inputs)


def _patches_of_groups(layer, inputs, conditioning, groups):
    """Returns the patches of channels-last `inputs` as `Rows` `[rows, positions * in]`, or `[groups, ...]` of many groups."""
    inputs = ops.stop_gradient(inputs)
    rows = patches(inputs, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, conditioning)
    return rows_of_groups(rows, rows.values.shape[1], inputs.shape[-1] // groups, groups)


def rows_of_groups(rows, size, num_in, groups):
    """Returns patches of `size` positions as `Rows` `[rows, positions * in]`, or `[groups, ...]` of many groups."""
    if groups == 1:
        return rows._replace(values=ops.reshape(rows.values, (-1, size * num_in)))
    # [rows, positions, groups * in] -> [groups, rows, positions * in]
    values = ops.transpose(ops.reshape(rows.values, (-1, size, groups, num_in)), (2, 0, 1, 3))
    return rows._replace(values=ops.reshape(values, (groups, -1, size * num_in)))


def matrix_of(kernel, num_in, groups):
    """Returns a kernel `[*kernel_size, in, groups * out]` as a matrix `[positions * in, out]`, or `[groups, ...]`."""
    if groups == 1:
        return ops.reshape(kernel, (num_in, -1))
    return ops.swapaxes(ops.reshape(kernel, (num_in, groups, -1)), 0, 1)


def kernel_of(matrix, shape, groups):
    """Returns a matrix of `matrix_of` in the kernel's `shape`."""
    return ops.reshape(ops.swapaxes(matrix, 0, 1) if groups > 1 else matrix, shape)


def _conditioned_convolution(layer, kernel, conditioning, inputs, depthwise):
    """Returns the kernel, its gradient conditioned on patches and on outputs, and a carrier for those.

    The kernel is `[*kernel_size, in of a group, out of all groups]`; if depthwise, `[*kernel_size, channels, multiplier]`,
    where every channel is a group.
    """
    inputs = _channels_last(layer, inputs)
    groups = inputs.shape[-1] if depthwise else layer.groups
    num_groups = int(groups > 1)
    rows = _patches_of_groups(layer, inputs, conditioning, groups)
    matrix = matrix_of(kernel, rows.values.shape[-1], groups)

    def rows_of(outputs):
        outputs = _channels_last(layer, outputs)
        if not num_groups:
            return outputs
        # [samples, *positions, groups * out] -> [groups, samples, *positions, out]
        outputs = ops.reshape(outputs, (*ops.shape(outputs)[:-1], groups, outputs.shape[-1] // groups))
        return ops.moveaxis(outputs, -2, 0)

    num_samples, *lengths, _ = ops.shape(inputs)
    _, lengths = positions(lengths, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
    num_outputs = math.prod(kernel.shape[-2:]) if depthwise else kernel.shape[-1]
    output_shape = [num_samples, *lengths]
    output_shape.insert(1 if layer.data_format == "channels_first" else len(output_shape), num_outputs)
    outputs = Outputs(tuple(output_shape), rows_of, num_groups=num_groups)
    matrix, carrier = conditioned(matrix, conditioning, rows, outputs)
    return kernel_of(matrix, kernel.shape, groups), carrier


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
