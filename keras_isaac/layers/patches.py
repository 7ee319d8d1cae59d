"""The patches of an image that a convolution multiplies, as rows."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from keras import ops

from keras_isaac import backend
from keras_isaac.curvature.rows import Rows, expected_total, num_read, sampled_rows, subsample, subsample_indices
from keras_isaac.scope import Conditioning

# Of a convolution: lengths, paddings before, strides, numbers of positions, each a spatial axis, the offsets of the kernel's
# positions, and whether there is padding. Lengths, paddings and numbers are integers or scalar tensors.
_Grid: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...], tuple[Any, ...], tuple[tuple[int, ...], ...], bool]


class Window(NamedTuple):
    """The patches of an image that a convolution multiplies.

    Args:
        kernel_size: tuple of integers, one per spatial axis, as are `strides` and `dilation_rate`.
        strides: tuple of integers.
        dilation_rate: tuple of integers.
        padding: `"valid"`, `"same"` or `"causal"`.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str


def positions(lengths: Any, window: Window) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns a convolution's padding before each spatial axis, and its number of positions along it.

    Args:
        lengths: the sizes of the spatial axes, integers, or scalar tensors where tracing leaves them open.
        window: the `Window`.
    """
    before, outputs = [], []
    for length, size, stride, dilation in zip(lengths, *window[:3], strict=True):
        extent = (size - 1) * dilation + 1
        missing = {"valid": 0, "causal": extent - 1}.get(window.padding)
        if missing is None:
            missing = (-(-length // stride) - 1) * stride + extent - length
            missing = max(missing, 0) if isinstance(length, int) else ops.maximum(missing, 0)
        before.append(missing // 2 if window.padding == "same" else missing)
        outputs.append((length + missing - extent) // stride + 1)
    return tuple(before), tuple(outputs)


def patches(inputs: Any, window: Window, conditioning: Conditioning) -> Rows:
    """Returns the patches of channels-last `inputs` that a convolution multiplies.

    If there are more patches than are read, forms only those on a coarser grid of positions.

    Args:
        inputs: tensor `[samples, *spatial, channels]`.
        window: the `Window`.
        conditioning: the `Conditioning` in force.

    Returns:
        `Rows` of a tensor `[rows, prod(kernel_size), channels]`.
    """
    num_samples, *lengths, num_channels = ops.shape(inputs)
    before, outputs = positions(lengths, window)
    steps, is_padded = zip(window.kernel_size, window.dilation_rate, strict=True), window.padding != "valid"
    offsets = tuple(itertools.product(*(range(0, size * each, each) for size, each in steps)))
    num_total = expected_total(tuple(size if isinstance(size, int) else None for size in (inputs.shape[0], *outputs)))
    if conditioning.weight_sharing != "reduce":
        grid = (tuple(lengths), before, tuple(window.strides), outputs, offsets, is_padded)
        values, num_valid = _some_patches(inputs, grid, num_read(conditioning)), math.prod((num_samples, *outputs))
        return Rows(values, ops.shape(values)[0], num_valid, num_total, True)
    # Pads both sides wide enough for any length. A patch starts where its padding starts.
    widths = [offset if is_padded else 0 for offset in offsets[-1]]
    if any(widths):
        inputs = ops.pad(inputs, [(0, 0), *((width, width) for width in widths), (0, 0)])
    means = []
    for offset in offsets:
        starts = [width - pad + place for width, pad, place in zip(widths, before, offset, strict=True)]
        places = zip(starts, window.strides, outputs, strict=True)
        index = [slice(start, start + (output - 1) * stride + 1, stride) for start, stride, output in places]
        means.append(ops.mean(inputs[(slice(None), *index)], axis=tuple(range(1, len(index) + 1))))
    values = ops.reshape(ops.stack(means, axis=-2), (-1, len(means), num_channels))
    values = subsample(values, num_read(conditioning), axis=0)
    return Rows(values, ops.shape(values)[0], num_samples, num_total, True)


def patch_rows(images: Any, conditioning: Conditioning, mask: Any, window: Window) -> Rows:
    """Returns the patches that a convolution multiplies in the images of all time steps, as `Rows` of a matrix.

    Args:
        images: tensor `[samples, steps, *spatial, channels]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[samples, steps]`, true where a step is valid, or `None`.
        window: the `Window`.
    """
    samples, steps, *image = ops.shape(images)
    images = ops.reshape(images, (samples * steps, *image))
    is_reduced = conditioning.weight_sharing == "reduce"
    # The mean patch of every image is needed for the mean over a sample's images.
    rows = patches(images, window, dataclasses.replace(conditioning, max_rows=2**31) if is_reduced else conditioning)
    # [rows, kernel positions, channels] -> [rows, kernel positions * channels]
    num_in = rows.values.shape[1] * image[-1]
    values = ops.reshape(rows.values, (ops.shape(rows.values)[0], num_in))
    if is_reduced:
        means = sampled_rows(ops.reshape(values, (samples, steps, num_in)), conditioning, mask)
        return Rows(*means[:3], rows.num_total, True)
    if mask is None:
        return rows.of(values)
    # The patches of images whose one channel is the mask. A patch reads at least one position of the image.
    mask = ops.reshape(ops.cast(mask, "float32"), (samples * steps, *[1] * len(image)))
    num_images_valid = ops.sum(mask)
    mask = patches(ops.broadcast_to(mask, (samples * steps, *image[:-1], 1)), window, conditioning).values
    mask = ops.max(mask, axis=1)
    num_sampled = ops.sum(mask, axis=(-2, -1), keepdims=True)
    _, outputs = positions(image[:-1], window)
    num_valid = ops.reshape(num_images_valid * math.prod(outputs), (1, 1))
    return Rows(values * ops.cast(mask, values.dtype), num_sampled, num_valid, rows.num_total, True)


def _some_patches(inputs: Any, grid: _Grid, max_rows: int) -> Any:
    """Returns the patches of a coarse grid of positions, of some samples."""
    num_samples, num_channels = ops.shape(inputs)[0], inputs.shape[-1]
    if all(isinstance(size, int) for size in (num_samples, *grid[0])):
        index = backend.constant(_static_places, 0, num_samples, grid, max_rows)
        is_inside = backend.constant(_static_places, 1, num_samples, grid, max_rows) if grid[-1] else None
    else:
        index, is_inside = _places(num_samples, grid, max_rows, ops)
    pixels = ops.reshape(inputs, (num_samples * math.prod(grid[0]), num_channels))
    # Of no pixels, JAX would take no positions either.
    rows = ops.reshape(ops.take(pixels, index, axis=0), (*ops.shape(index), num_channels))
    return rows if is_inside is None else ops.where(is_inside[..., None], rows, ops.zeros((), rows.dtype))


def _places(num_samples: Any, grid: _Grid, max_rows: int, numbers: Any) -> tuple[Any, Any]:
    """Returns which of the flattened pixels make up the patches `[rows, kernel positions]`, and which lie inside the image.

    Args:
        num_samples: integer, or scalar tensor.
        grid: the convolution, see `_Grid`.
        max_rows: integer.
        numbers: `numpy`, or `keras.ops` if a number is a tensor.
    """
    lengths, before, strides, outputs, offsets, is_padded = grid
    num_positions = math.prod(outputs)
    # Keeps about sixteen positions of a sample rather than more samples. The grid is then as coarse as the limit requires.
    if isinstance(num_positions, int):
        samples = subsample_indices(num_samples, max(1, max_rows // min(num_positions, 16)))
    else:
        samples = subsample_indices(num_samples, ops.maximum(1, max_rows // ops.clip(num_positions, 1, 16)))
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
    rest = subsample_indices(math.prod(sizes), max_rows)
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


def _static_places(part: int, num_samples: int, grid: _Grid, max_rows: int) -> np.ndarray:
    return _places(num_samples, grid, max_rows, np)[part]
