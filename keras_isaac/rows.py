"""The rows that stand for a layer's inputs: all positions, a part of them, or their means; patches of images.

Inputs here are `[samples, *positions, features]`; rows are `[..., rows, features]`, leading axes being groups. A function that
may leave out masked positions returns the rows, zero where masked, and how many of them count (`None`: all).
"""

import functools
import itertools
import math

import numpy as np
from keras import ops

from keras_isaac.conditioner import spread, spread_indices


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
    offsets = tuple(
        itertools.product(*(range(0, size * each, each) for size, each in zip(kernel_size, dilation_rate, strict=True)))
    )
    if conditioning.max_rows is not None and conditioning.weight_sharing == "expand":
        grid = (tuple(inputs.shape[1:-1]), tuple(pads), tuple(strides), tuple(outputs), offsets)
        return _some_patches(inputs, grid, conditioning.max_rows)
    if any(map(any, pads)):
        inputs = ops.pad(inputs, [(0, 0), *pads, (0, 0)])
    slices = []
    for offset in offsets:
        places = zip(offset, strides, outputs, strict=True)
        index = [slice(start, start + (output - 1) * stride + 1, stride) for start, stride, output in places]
        slices.append(inputs[(slice(None), *index)])
    if conditioning.weight_sharing == "reduce":
        slices = [ops.mean(each, axis=tuple(range(1, len(each.shape) - 1))) for each in slices]
    stacked = ops.reshape(ops.stack(slices, axis=-2), (-1, len(slices), inputs.shape[-1]))
    return spread(stacked, conditioning.max_rows, axis=0)


def _some_patches(inputs, grid, max_rows):
    """Returns the patches of a coarse grid of positions, of some samples."""
    num_samples = ops.shape(inputs)[0]
    is_static = isinstance(num_samples, int)
    index, is_inside = (_static_places if is_static else _places)(num_samples, grid, max_rows)
    pixels = ops.reshape(inputs, (num_samples * math.prod(grid[0]), inputs.shape[-1]))
    # Of no pixels, JAX would take no positions either.
    rows = ops.reshape(ops.take(pixels, index, axis=0), (*ops.shape(index), inputs.shape[-1]))
    return rows if is_inside is None else ops.where(is_inside[..., None], rows, ops.zeros((), rows.dtype))


def _places(num_samples, grid, max_rows):
    """Returns which of the flattened pixels make up the patches `[rows, kernel positions]`, and which of those there are.

    Args:
        num_samples: integer, or scalar tensor.
        grid: lengths, paddings, strides, numbers of positions, each a spatial axis, and the offsets of the kernel's positions.
        max_rows: integer.
    """
    lengths, pads, strides, outputs, offsets = grid
    numbers = np if isinstance(num_samples, int) else ops
    num_positions = math.prod(outputs)
    # Some sixteen positions of a sample before fewer samples, then as coarse a grid as keeps to the limit.
    samples = spread_indices(num_samples, max(1, max_rows // min(num_positions, 16)))
    if numbers is np:
        ratio = max(len(samples) * num_positions / max_rows, 1.0)
        factor = math.ceil(ratio ** (1 / len(lengths)) - 1e-9)
    else:
        ratio = ops.maximum(ops.cast(ops.shape(samples)[0], "float32") * (num_positions / max_rows), 1.0)
        factor = ops.cast(ops.ceil(ratio ** (1 / len(lengths)) - 1e-6), "int32")
    steps = [numbers.minimum(factor, output) for output in outputs]
    kept = [numbers.arange((step - 1) // 2, output, step) for step, output in zip(steps, outputs, strict=True)]
    sizes = [numbers.shape(each)[0] for each in (samples, *kept)]
    rest = spread_indices(math.prod(sizes), max_rows)
    index, unit, are_inside = 0, 1, []
    for axis in reversed(range(len(lengths))):
        places = numbers.take(kept[axis], rest % sizes[axis + 1], axis=0) * strides[axis] - pads[axis][0]
        places = places[:, None] + np.array([offset[axis] for offset in offsets], "int32")
        are_inside.append((places >= 0) & (places < lengths[axis]))
        index, unit, rest = index + unit * places, unit * lengths[axis], rest // sizes[axis + 1]
    index = index + unit * numbers.take(samples, rest, axis=0)[:, None]
    if not any(map(any, pads)):
        return index, None
    is_inside = functools.reduce(numbers.logical_and, are_inside)
    return numbers.where(is_inside, index, 0), is_inside


# Eager PyTorch would compute them in every step.
_static_places = functools.lru_cache(maxsize=128)(_places)
