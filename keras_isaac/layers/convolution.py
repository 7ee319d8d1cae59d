"""How convolutions read as rows times a kernel."""

from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import Rows, sampled_rows
from keras_isaac.keras_hooks import call_with
from keras_isaac.layers.lora import conditioned_factors, has_lora, main_kernels
from keras_isaac.layers.patches import patches
from keras_isaac.layers.products import ConditioningOf, bias_and_activation, conditioned, conditioning_in_force
from keras_isaac.scope import Conditioning


class ConvAdapter:
    """`Conv1D/2D/3D` (and `DepthwiseConv`): a row is a patch of the inputs; feature groups are groups."""

    @staticmethod
    def kernels(layer: Any) -> list[keras.Variable]:
        """The kernel, or LoRA's factors."""
        return main_kernels(layer)

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call`, its kernel conditioned on patches."""
        if has_lora(layer):
            return _call_with_factors(layer, conditioning_of, inputs)
        depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
        value = ops.convert_to_tensor(layer.kernel)
        conditioning = conditioning_in_force([layer.kernel], conditioning_of)
        value = _conditioned_convolution(layer, value, conditioning, inputs, depthwise)
        return call_with(layer, [(layer.kernel, value)], inputs)


class SeparableConvAdapter:
    """`SeparableConv1D/2D`: a depthwise convolution, and a product with what it returns at each position."""

    @staticmethod
    def kernels(layer: Any) -> list[keras.Variable]:
        """Both kernels."""
        return [layer.depthwise_kernel, layer.pointwise_kernel]

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call` in its two steps."""
        depthwise, pointwise = (ops.convert_to_tensor(kernel) for kernel in SeparableConvAdapter.kernels(layer))
        conditioning = conditioning_of(layer.depthwise_kernel)
        if conditioning is not None:
            depthwise = _conditioned_convolution(layer, depthwise, conditioning, inputs, depthwise=True)
        options = {"padding": layer.padding, "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
        strides = layer.strides if layer.data_format == "channels_last" else layer.strides[-layer.rank :]
        inputs = ops.depthwise_conv(inputs, depthwise, strides=strides, **options)
        conditioning = conditioning_of(layer.pointwise_kernel)
        if conditioning is not None:
            rows = sampled_rows(channels_last(layer, inputs), conditioning)
            matrix = conditioned(ops.reshape(pointwise, pointwise.shape[-2:]), conditioning, rows)
            pointwise = ops.reshape(matrix, pointwise.shape)
        outputs = ops.conv(inputs, pointwise, strides=1, padding="valid", data_format=layer.data_format)
        return bias_and_activation(layer, outputs, layer.data_format)


class ConvTransposeAdapter:
    """`Conv1D/2D/3DTranspose`: every pixel of the inputs is a row."""

    @staticmethod
    def kernels(layer: Any) -> list[keras.Variable]:
        """The kernel, `[*kernel_size, out, in]`."""
        return [layer.kernel]

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call`, its kernel conditioned on pixels."""
        value = ops.convert_to_tensor(layer.kernel)
        conditioning = conditioning_in_force([layer.kernel], conditioning_of)
        rows = sampled_rows(channels_last(layer, inputs), conditioning)
        # [*kernel_size, out, in] -> [in, kernel positions * out]
        matrix = ops.transpose(ops.reshape(value, (-1, value.shape[-1])))
        matrix = conditioned(matrix, conditioning, rows)
        return call_with(layer, [(layer.kernel, ops.reshape(ops.transpose(matrix), value.shape))], inputs)


def _call_with_factors(layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
    """Returns the layer's own `call`, with LoRA's factors `[*kernel_size, in of a group, rank]`, `[rank, out]` conditioned."""
    kernels = ConvAdapter.kernels(layer)
    conditioning = conditioning_in_force(kernels, conditioning_of)
    rows = _patches_of_groups(layer, channels_last(layer, inputs), conditioning, layer.groups)
    a, b = (ops.convert_to_tensor(kernel) for kernel in kernels)
    first, second = ops.reshape(a, (-1, a.shape[-1])), b
    if layer.groups > 1:
        # One first factor multiplies the patches of all groups. Each group's product multiplies its own columns of the second.
        counts: dict[str, Any] = {
            name: None if number is None else number * layer.groups
            for name, number in rows._asdict().items()
            if name.startswith("num_")
        }
        rows = rows._replace(values=ops.reshape(rows.values, (-1, rows.values.shape[-1])), **counts)
        second = matrix_of(b, b.shape[0], layer.groups)
    first, second = conditioned_factors(kernels, (first, second), conditioning_of, rows)
    second = kernel_of(second, b.shape, layer.groups)
    return call_with(layer, zip(kernels, (ops.reshape(first, a.shape), second), strict=True), inputs)


def _patches_of_groups(layer: Any, inputs: Any, conditioning: Conditioning, groups: int) -> Rows:
    """Returns the patches of channels-last `inputs` as `Rows` `[rows, positions * in]`, or `[groups, ...]` of many groups."""
    inputs = ops.stop_gradient(inputs)
    rows = patches(inputs, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, conditioning)
    return rows_of_groups(rows, rows.values.shape[1], inputs.shape[-1] // groups, groups)


def rows_of_groups(rows: Rows, size: int, num_in: int, groups: int) -> Rows:
    """Returns patches of `size` positions as `Rows` `[rows, positions * in]`, or `[groups, ...]` of many groups."""
    if groups == 1:
        return rows._replace(values=ops.reshape(rows.values, (-1, size * num_in)))
    # [rows, positions, groups * in] -> [groups, rows, positions * in]
    values = ops.transpose(ops.reshape(rows.values, (-1, size, groups, num_in)), (2, 0, 1, 3))
    return rows._replace(values=ops.reshape(values, (groups, -1, size * num_in)))


def matrix_of(kernel: Any, num_in: int, groups: int) -> Any:
    """Returns a kernel `[*kernel_size, in, groups * out]` as a matrix `[positions * in, out]`, or `[groups, ...]`."""
    if groups == 1:
        return ops.reshape(kernel, (num_in, -1))
    return ops.swapaxes(ops.reshape(kernel, (num_in, groups, -1)), 0, 1)


def kernel_of(matrix: Any, shape: tuple[int, ...], groups: int) -> Any:
    """Returns a matrix of `matrix_of` in the kernel's `shape`."""
    return ops.reshape(ops.swapaxes(matrix, 0, 1) if groups > 1 else matrix, shape)


def _conditioned_convolution(layer: Any, kernel: Any, conditioning: Conditioning, inputs: Any, depthwise: bool) -> Any:
    """Returns the kernel, its gradient conditioned on patches.

    The kernel is `[*kernel_size, in of a group, out of all groups]`; if depthwise, `[*kernel_size, channels, multiplier]`,
    where every channel is a group.
    """
    inputs = channels_last(layer, inputs)
    groups = inputs.shape[-1] if depthwise else layer.groups
    rows = _patches_of_groups(layer, inputs, conditioning, groups)
    matrix = matrix_of(kernel, rows.values.shape[-1], groups)
    return kernel_of(conditioned(matrix, conditioning, rows), kernel.shape, groups)


def channels_last(layer: Any, images: Any, axis: int = 1) -> Any:
    """Returns images with their channels, which are at `axis` where they come first, as the last axis."""
    return images if layer.data_format == "channels_last" else ops.moveaxis(images, axis, -1)
