"""The rows that stand for a layer's inputs: all positions, a part of them, or their means; patches of images.

Inputs here are `[samples, *positions, features]`; rows are `[..., rows, features]`, leading axes being groups. A function that
may leave out masked positions returns the rows, zero where masked, and how many of them count (`None`: all).
"""

import itertools
import math

from keras import ops

from keras_isaac.conditioner import spread


def representatives(inputs, conditioning, mask=None, num_groups=0, summed=False):
    """Returns the rows that stand for `inputs`, and how many count.

    Args:
        inputs: tensor `[*groups, samples, *positions, features]`.
        conditioning: the `Conditioning` in force, for `weight_sharing` and `max_rows`.
        mask: tensor `[samples, *positions]`, true where a position counts, or `None`.
        num_groups: how many leading axes are groups.
        summed: boolean, whether to reduce a sample to the sum of its positions instead of their mean, as gradients are.

    Returns:
        Rows `[*groups, rows, features]`, and a scalar tensor or `None`.
    """
    shape = ops.shape(inputs)
    groups, samples, num_features = shape[:num_groups], shape[num_groups], shape[-1]
    if len(shape) == num_groups + 2:
        if mask is None:
            return inputs, None
        mask = ops.cast(mask, inputs.dtype)
        return inputs * mask[:, None], ops.sum(mask)
    # No size is left for `reshape` to find, which it could not in an empty batch.
    positions = math.prod(shape[num_groups + 1 : -1])
    inputs = ops.reshape(inputs, (*groups, samples, positions, num_features))
    if mask is not None:
        mask = ops.cast(ops.reshape(mask, (samples, positions, 1)), inputs.dtype)
    if conditioning.weight_sharing == "reduce":
        if mask is None:
            reduced = ops.sum(inputs, axis=-2) if summed else ops.mean(inputs, axis=-2)
            return spread(reduced, conditioning.max_rows), None
        lengths = ops.sum(mask, axis=-2)
        reduced = ops.sum(inputs * mask, axis=-2)
        if not summed:
            reduced = reduced / ops.where(lengths == 0, ops.ones_like(lengths), lengths)
        counts = spread(ops.cast(lengths > 0, reduced.dtype), conditioning.max_rows)
        return spread(reduced, conditioning.max_rows), ops.sum(counts)
    rows = spread(ops.reshape(inputs, (*groups, samples * positions, num_features)), conditioning.max_rows)
    if mask is None:
        return rows, None
    mask = spread(ops.reshape(mask, (-1, 1)), conditioning.max_rows)
    return rows * mask, ops.sum(mask)


def patches(inputs, kernel_size, strides, dilation_rate, padding, conditioning):
    """Returns the patches of channels-last `inputs` that a convolution multiplies, `[rows, *kernel positions, channels]`.

    Of more than `max_rows`, only those on a coarser grid of positions are ever formed.

    Args:
        inputs: tensor `[samples, *spatial, channels]` of static spatial shape.
        kernel_size: tuple of integers, one a spatial axis, as are `strides` and `dilation_rate`.
        strides: tuple of integers.
        dilation_rate: tuple of integers.
        padding: `"valid"`, `"same"` or `"causal"`.
        conditioning: the `Conditioning` in force.

    Returns:
        Tensor `[rows, prod(kernel_size), channels]`.
    """
    num_axes = len(kernel_size)
    pads, outputs = [], []
    for length, size, stride, dilation in zip(inputs.shape[1:-1], kernel_size, strides, dilation_rate, strict=True):
        extent = (size - 1) * dilation + 1
        missing = {
            "valid": 0,
            "causal": extent - 1,
            "same": max((math.ceil(length / stride) - 1) * stride + extent - length, 0),
        }
        before = extent - 1 if padding == "causal" else missing[padding] // 2
        pads.append((before, missing[padding] - before))
        outputs.append((length + missing[padding] - extent) // stride + 1)
    reduce, max_rows = conditioning.weight_sharing == "reduce", conditioning.max_rows
    coarse = (1,) * num_axes
    num_positions = math.prod(outputs)
    if max_rows is not None and not reduce:
        # Some sixteen positions of a sample before fewer samples, then as coarse a grid as keeps to the limit.
        inputs = spread(inputs, max(1, max_rows // min(num_positions, 16)), axis=0)
        num_samples = ops.shape(inputs)[0]
        if isinstance(num_samples, int):
            factor = math.ceil(max(num_samples * num_positions / max_rows, 1.0) ** (1 / num_axes) - 1e-9)
        else:
            ratio = ops.cast(num_samples, "float32") * (num_positions / max_rows)
            factor = ops.cast(ops.ceil(ops.maximum(ratio, 1.0) ** (1 / num_axes) - 1e-6), "int32")
        coarse = tuple(_minimum(factor, output) for output in outputs)
    if any(map(any, pads)):
        inputs = ops.pad(inputs, [(0, 0), *pads, (0, 0)])
    slices = []
    for offsets in itertools.product(*map(range, kernel_size)):
        index = [slice(None)]
        for offset, dilation, stride, output, step in zip(offsets, dilation_rate, strides, outputs, coarse, strict=True):
            start = offset * dilation
            index.append(slice(start + (step - 1) // 2 * stride, start + (output - 1) * stride + 1, stride * step))
        piece = inputs[tuple(index)]
        slices.append(ops.mean(piece, axis=tuple(range(1, num_axes + 1))) if reduce else piece)
    stacked = ops.reshape(ops.stack(slices, axis=-2), (-1, len(slices), inputs.shape[-1]))
    if max_rows is None:
        return stacked
    return spread(stacked, max_rows, axis=0)


def _minimum(a, b):
    return min(a, b) if isinstance(a, int) else ops.minimum(a, b)
