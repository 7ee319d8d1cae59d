"""The rows that stand for a layer's inputs: all positions, a part of them, or their means; patches of images.

Inputs here are `[*groups, samples, *positions, features]`; rows are `[*groups, rows, features]`.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_isaac import backend
from keras_isaac.scope import Conditioning

_GOLDEN = (5**0.5 - 1) / 2


class Rows(NamedTuple):
    """Rows that stand for a layer's inputs.

    Args:
        values: tensor `[*groups, rows, in]`, zero where masked.
        num_counted: tensor that broadcasts to `[*groups, 1, 1]`, how many of them count, or `None` for all.
        num_represented: integer, how many rows they stand for, or `None` where tracing leaves it open.
    """

    values: Any
    num_counted: Any = None
    num_represented: int | None = None


def sampled_rows(inputs: Any, conditioning: Conditioning, mask: Any = None, num_groups: int = 0, summed: bool = False) -> Rows:
    """Returns the `Rows` that stand for `inputs`.

    Args:
        inputs: tensor `[*groups, samples, *positions, features]`.
        conditioning: the `Conditioning` in force, for `weight_sharing` and `max_rows`.
        mask: tensor `[samples, *positions]`, with the groups in front or without, true where a position counts, or `None`.
        num_groups: how many leading axes are groups.
        summed: boolean, whether to reduce a sample to the sum of its positions instead of their mean, as gradients are.
    """
    shape = ops.shape(inputs)
    groups, samples, num_features = shape[:num_groups], shape[num_groups], shape[-1]
    sizes = inputs.shape[num_groups:-1]
    num_represented = None if None in sizes else math.prod(sizes)
    # No size is left for `reshape` to find, which it could not in an empty batch.
    positions = math.prod(shape[num_groups + 1 : -1])
    if mask is not None:
        mask_groups = groups if len(mask.shape) == len(inputs.shape) - 1 else ()
        # In float32: a bfloat16 cannot count to a thousand.
        mask = ops.cast(ops.reshape(mask, (*mask_groups, samples, positions, 1)), "float32")
    if conditioning.weight_sharing == "reduce" and len(inputs.shape) > num_groups + 2:
        inputs = ops.reshape(inputs, (*groups, samples, positions, num_features))
        if mask is None:
            rows = ops.sum(inputs, axis=-2) if summed else ops.mean(inputs, axis=-2)
        else:
            lengths = ops.sum(mask, axis=-2)
            rows = ops.sum(inputs * ops.cast(mask, inputs.dtype), axis=-2)
            rows = rows if summed else rows / ops.cast(backend.clip(lengths, 1), rows.dtype)
            mask = ops.cast(lengths > 0, "float32")
        max_rows = conditioning.max_rows
    else:
        rows = ops.reshape(inputs, (*groups, samples * positions, num_features)) if len(shape) > num_groups + 2 else inputs
        mask = None if mask is None else ops.reshape(mask, (*mask_groups, samples * positions, 1))
        # Without positions that share a kernel, all rows count.
        max_rows = conditioning.max_rows if len(shape) > num_groups + 2 else None
    rows = spread(rows, max_rows)
    if mask is None:
        return Rows(rows, None, num_represented)
    mask = spread(mask, max_rows)
    return Rows(rows * ops.cast(mask, rows.dtype), ops.sum(mask, axis=(-2, -1), keepdims=True), num_represented)


def spread(rows, max_rows, axis=-2):
    """Returns at most `max_rows` of the rows along an axis, evenly spread over them; all for `None`."""
    num_rows = ops.shape(rows)[axis]
    if max_rows is None or (isinstance(num_rows, int) and num_rows <= max_rows):
        return rows
    return ops.take(rows, _as_index(spread_indices(num_rows, max_rows)), axis=axis)


def _as_index(index):
    # Kept on the device by PyTorch, which would copy it there in every step.
    return backend.constant(index) if isinstance(index, np.ndarray) else index


def spread_indices(num_rows, max_rows):
    """Returns at most `max_rows` indices below `num_rows`, one in each of as many equal strata: of NumPy for integers.

    Rows are samples by positions. A constant stride could meet the same position of every sample, so the place within the
    stratum moves by the golden ratio, which spreads it evenly.
    """
    if isinstance(num_rows, int) and isinstance(max_rows, int):
        strata = np.arange(min(num_rows, max_rows))
        return ((strata + strata * _GOLDEN % 1.0) / len(strata) * num_rows).astype("int32")
    num_rows = ops.cast(num_rows, "float64")
    num_strata = ops.minimum(num_rows, ops.cast(max_rows, "float64"))
    strata = ops.arange(0, num_strata, dtype="float64")
    return ops.cast((strata + strata * _GOLDEN % 1.0) / num_strata * num_rows, "int32")


def positions(lengths, kernel_size, strides, dilation_rate, padding):
    """Returns a convolution's padding before each spatial axis, and its number of positions along it.

    Args:
        lengths: the sizes of the spatial axes, integers, or scalar tensors where tracing leaves them open.
        kernel_size: tuple of integers, one a spatial axis, as are `strides` and `dilation_rate`.
        strides: tuple of integers.
        dilation_rate: tuple of integers.
        padding: `"valid"`, `"same"` or `"causal"`.
    """
    before, outputs = [], []
    for length, size, stride, dilation in zip(lengths, kernel_size, strides, dilation_rate, strict=True):
        extent = (size - 1) * dilation + 1
        missing = {"valid": 0, "causal": extent - 1}.get(padding)
        if missing is None:
            missing = (-(-length // stride) - 1) * stride + extent - length
            missing = max(missing, 0) if isinstance(length, int) else ops.maximum(missing, 0)
        before.append(missing // 2 if padding == "same" else missing)
        outputs.append((length + missing - extent) // stride + 1)
    return tuple(before), tuple(outputs)


def patches(inputs, kernel_size, strides, dilation_rate, padding, conditioning):
    """Returns the patches of channels-last `inputs` that a convolution multiplies, as `Rows` `[rows, positions, channels]`.

    Of more than `max_rows`, only those on a coarser grid of positions are ever formed.

    Args:
        inputs: tensor `[samples, *spatial, channels]`.
        kernel_size: as in `positions`, and so are the others.
        strides: tuple of integers.
        dilation_rate: tuple of integers.
        padding: `"valid"`, `"same"` or `"causal"`.
        conditioning: the `Conditioning` in force.

    Returns:
        `Rows` of a tensor `[rows, prod(kernel_size), channels]`.
    """
    num_samples, *lengths, num_channels = ops.shape(inputs)
    before, outputs = positions(lengths, kernel_size, strides, dilation_rate, padding)
    steps = zip(kernel_size, dilation_rate, strict=True)
    offsets = tuple(itertools.product(*(range(0, size * each, each) for size, each in steps)))
    sizes = (num_samples, *outputs)
    num_represented = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    if conditioning.max_rows is not None and conditioning.weight_sharing == "expand":
        grid = (tuple(lengths), before, tuple(strides), outputs, offsets, padding != "valid")
        return Rows(_some_patches(inputs, grid, conditioning.max_rows), None, num_represented)
    # Wide enough on both sides, whatever the lengths: a patch starts where its padding does.
    widths = [offset if padding != "valid" else 0 for offset in offsets[-1]]
    if any(widths):
        inputs = ops.pad(inputs, [(0, 0), *((width, width) for width in widths), (0, 0)])
    slices = []
    for offset in offsets:
        starts = [width - pad + place for width, pad, place in zip(widths, before, offset, strict=True)]
        places = zip(starts, strides, outputs, strict=True)
        index = [slice(start, start + (output - 1) * stride + 1, stride) for start, stride, output in places]
        slices.append(inputs[(slice(None), *index)])
    if conditioning.weight_sharing == "reduce":
        slices = [ops.mean(each, axis=tuple(range(1, len(each.shape) - 1))) for each in slices]
    stacked = ops.reshape(ops.stack(slices, axis=-2), (-1, len(slices), num_channels))
    return Rows(spread(stacked, conditioning.max_rows, axis=0), None, num_represented)


def _some_patches(inputs, grid, max_rows):
    """Returns the patches of a coarse grid of positions, of some samples."""
    num_samples, num_channels = ops.shape(inputs)[0], inputs.shape[-1]
    is_static = _is_static(num_samples, grid)
    index, is_inside = (_static_places if is_static else _places)(num_samples, grid, max_rows)
    pixels = ops.reshape(inputs, (num_samples * math.prod(grid[0]), num_channels))
    # Of no pixels, JAX would take no positions either.
    rows = ops.reshape(ops.take(pixels, _as_index(index), axis=0), (*ops.shape(index), num_channels))
    return rows if is_inside is None else ops.where(_as_index(is_inside)[..., None], rows, ops.zeros((), rows.dtype))


def _is_static(num_samples, grid):
    return all(isinstance(size, int) for size in (num_samples, *grid[0]))


def _places(num_samples, grid, max_rows):
    """Returns which of the flattened pixels make up the patches `[rows, kernel positions]`, and which of those there are.

    Args:
        num_samples: integer, or scalar tensor.
        grid: lengths, paddings before, strides, numbers of positions, each a spatial axis, the offsets of the kernel's
            positions, and whether there is padding. Lengths, paddings and numbers are integers or scalar tensors.
        max_rows: integer.
    """
    lengths, before, strides, outputs, offsets, is_padded = grid
    numbers = np if _is_static(num_samples, grid) else ops
    num_positions = math.prod(outputs)
    # Some sixteen positions of a sample before fewer samples, then as coarse a grid as keeps to the limit.
    if isinstance(num_positions, int):
        samples = spread_indices(num_samples, max(1, max_rows // min(num_positions, 16)))
    else:
        samples = spread_indices(num_samples, ops.maximum(1, max_rows // ops.clip(num_positions, 1, 16)))
    if numbers is np:
        ratio = max(len(samples) * num_positions / max_rows, 1.0)
        factor = math.ceil(ratio ** (1 / len(lengths)) - 1e-9)
    else:
        num_patches = ops.cast(ops.shape(samples)[0], "float32") * ops.cast(num_positions, "float32")
        ratio = ops.maximum(num_patches / max_rows, 1.0)
        factor = ops.cast(ops.ceil(ratio ** (1 / len(lengths)) - 1e-6), "int32")
    steps = [numbers.minimum(factor, output) for output in outputs]
    kept = [numbers.arange((step - 1) // 2, output, step) for step, output in zip(steps, outputs, strict=True)]
    sizes = [numbers.shape(each)[0] for each in (samples, *kept)]
    rest = spread_indices(math.prod(sizes), max_rows)
    index, unit, are_inside = 0, 1, []
    for axis in reversed(range(len(lengths))):
        places = numbers.take(kept[axis], rest % sizes[axis + 1], axis=0) * strides[axis] - before[axis]
        places = places[:, None] + np.array([offset[axis] for offset in offsets], "int32")
        are_inside.append((places >= 0) & (places < lengths[axis]))
        index, unit, rest = index + unit * places, unit * lengths[axis], rest // sizes[axis + 1]
    index = index + unit * numbers.take(samples, rest, axis=0)[:, None]
    if not is_padded:
        return index, None
    is_inside = functools.reduce(numbers.logical_and, are_inside)
    return numbers.where(is_inside, index, 0), is_inside


# Eager PyTorch would compute them in every step.
_static_places = functools.lru_cache(maxsize=128)(_places)
