"""How convolutions read as rows times a kernel."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.operations import conditioned
from keras_isaac.curvature.rows import Rows, sampled_rows
from keras_isaac.keras_hooks import call_with
from keras_isaac.layers.patches import Window, patches
from keras_isaac.layers.products import (
    ConditioningOf,
    Pairs,
    bias_and_activation,
    conditioned_matrices,
    conditioning_in_force,
    main_kernels,
)


class ConvAdapter:
    """`Conv1D/2D/3D` (and `DepthwiseConv`): a row is a patch of the inputs; feature groups are groups."""

    kernels = staticmethod(main_kernels)

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call`, its kernel conditioned on patches."""
        return call_with(layer, _on_patches(layer, main_kernels(layer), conditioning_of, inputs), inputs)


class SeparableConvAdapter:
    """`SeparableConv1D/2D`: a depthwise convolution, and a product with what it returns at each position."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """Both kernels."""
        return [layer.depthwise_kernel, layer.pointwise_kernel]

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call` in its two steps."""
        depthwise, pointwise = map(ops.convert_to_tensor, self.kernels(layer))
        if conditioning_of(layer.depthwise_kernel) is not None:
            ((_, depthwise),) = _on_patches(layer, [layer.depthwise_kernel], conditioning_of, inputs)
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

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The kernel, `[*kernel_size, out, in]`."""
        return [layer.kernel]

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """The layer's own `call`, its kernel conditioned on pixels."""
        value = ops.convert_to_tensor(layer.kernel)
        conditioning = conditioning_in_force([layer.kernel], conditioning_of)
        rows = sampled_rows(channels_last(layer, inputs), conditioning)
        # [*kernel_size, out, in] -> [in, kernel positions * out]
        matrix = ops.transpose(ops.reshape(value, (-1, value.shape[-1])))
        matrix = conditioned(matrix, conditioning, rows)
        return call_with(layer, [(layer.kernel, ops.reshape(ops.transpose(matrix), value.shape))], inputs)


def _on_patches(layer: Any, kernels: Sequence[keras.Variable], conditioning_of: ConditioningOf, inputs: Any) -> Pairs:
    inputs = channels_last(layer, ops.stop_gradient(inputs))
    rows = patches(inputs, window_of(layer), conditioning_in_force(kernels, conditioning_of))
    # A depthwise convolution has a group for each channel.
    return conditioned_on_patches(kernels, conditioning_of, rows, getattr(layer, "groups", inputs.shape[-1]))


def conditioned_on_patches(
    kernels: Sequence[keras.Variable], conditioning_of: ConditioningOf, rows: Rows, groups: int
) -> Pairs:
    """Returns the kernel of a convolution, or LoRA's factors, with tensors whose gradients are conditioned on patches.

    Args:
        kernels: the variable `[*kernel_size, in of a group, out of all groups]`; if depthwise, `[*kernel_size, channels,
            multiplier]`; or LoRA's `[*kernel_size, in of a group, rank]` and `[rank, out of all groups]`.
        conditioning_of: function of a kernel, as in the adapters.
        rows: `Rows` of patches, `[rows, positions, channels]`, the last two axes merged or not.
        groups: integer, the number of groups.
    """
    first, *others = map(ops.convert_to_tensor, kernels)
    size, num_in = math.prod(first.shape[:-2]), math.prod(rows.values.shape[1:]) // groups
    values, groups_of_first = rows.values, groups
    if groups > 1:
        # [rows, positions, groups * in] -> [groups, rows, positions, in]
        values = ops.transpose(ops.reshape(values, (-1, size, groups, num_in // size)), (2, 0, 1, 3))
    if others:
        # LoRA's first factor multiplies the patches of all groups, and its second has columns for each.
        groups_of_first = 1
        num_sampled, num_valid, num_total = (None if number is None else number * groups for number in rows[1:4])
        rows = Rows(rows.values, num_sampled, num_valid, num_total, True)
    rows = rows.of(ops.reshape(values, (-1, num_in) if groups_of_first == 1 else (groups, -1, num_in)))
    matrices = [_matrix_of(first, num_in, groups_of_first), *(_matrix_of(each, each.shape[0], groups) for each in others)]
    matrix, *matrices = conditioned_matrices(kernels, matrices, conditioning_of, rows)
    values = [_kernel_of(matrix, first.shape, groups_of_first)]
    values += [_kernel_of(matrix, each.shape, groups) for matrix, each in zip(matrices, others, strict=True)]
    return list(zip(kernels, values, strict=True))


def _matrix_of(kernel: Any, num_in: int, groups: int) -> Any:
    """Returns a kernel `[..., groups * out]` as a matrix `[in, out]`, or `[groups, in, out]`."""
    if groups == 1:
        return ops.reshape(kernel, (num_in, -1))
    return ops.swapaxes(ops.reshape(kernel, (num_in, groups, -1)), 0, 1)


def _kernel_of(matrix: Any, shape: tuple[int, ...], groups: int) -> Any:
    """Returns a matrix of `_matrix_of` in the kernel's `shape`."""
    return ops.reshape(matrix if groups == 1 else ops.swapaxes(matrix, 0, 1), shape)


def channels_last(layer: Any, images: Any, axis: int = 1) -> Any:
    """Returns images with their channels, which are at `axis` where they come first, as the last axis."""
    return images if layer.data_format == "channels_last" else ops.moveaxis(images, axis, -1)


def window_of(layer: Any) -> Window:
    """Returns which patches a layer, or a recurrent cell, multiplies."""
    return Window(layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
