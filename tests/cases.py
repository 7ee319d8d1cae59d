"""The table of cases: one row a layer configuration. Every law in `test_layers.py` is tested over every row.

A row says how its layer reads, in NumPy: for each conditioned kernel, by attribute name, the rows `[groups, rows, in]` that
meet it, and a function that brings an array of the kernel's shape to `[groups, in, out]`.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import oracle
import pytest
from harness import to_numpy
from keras import layers


class Case(NamedTuple):
    """One layer, the shape of its inputs, and its reading; tokens of a vocabulary where `vocabulary` is given."""

    id: str
    layer: Callable[[], keras.Layer]
    input_shape: tuple
    read: Callable[..., dict]
    vocabulary: int | None = None
    prepare: Callable[[keras.Layer], None] = lambda layer: None


def expected_gradient(rows, matrix_of, plain_gradient, damping):
    """The plain gradient of a kernel, conditioned on rows in float64, in the kernel's shape."""
    plain_gradient = np.asarray(plain_gradient, "float64")
    places = matrix_of(np.arange(plain_gradient.size).reshape(plain_gradient.shape))
    result = np.zeros(plain_gradient.size)
    for group_rows, group_places in zip(rows, places, strict=True):
        result[group_places] = oracle.condition(group_rows, plain_gradient.ravel()[group_places], damping)
    return result.reshape(plain_gradient.shape)


def dense(layer, inputs, kernel="kernel"):
    """Every position is a row."""
    return {kernel: (inputs.reshape(1, -1, inputs.shape[-1]), lambda array: array.reshape(1, inputs.shape[-1], -1))}


def einsum(group, rows, contracted, kernel_group, kernel_in, kernel_out, kernel="kernel"):
    """Axes of the inputs that are groups, rows and contracted; axes of the kernel that are groups, inputs and outputs."""

    def read(layer, inputs):
        def part(array, *axes):
            ordered = np.transpose(array, [axis for kind in axes for axis in kind])
            sizes = [math.prod(array.shape[axis] for axis in kind) for kind in axes]
            return ordered.reshape(sizes)

        return {kernel: (part(inputs, group, rows, contracted), lambda array: part(array, kernel_group, kernel_in, kernel_out))}

    return read


def patches(layer, inputs):
    """`[rows, positions of the kernel, channels]`, by loops over the output's and the kernel's positions."""
    if layer.data_format == "channels_first":
        inputs = np.moveaxis(inputs, 1, -1)
    pads, lengths = [], []
    for length, size, stride, dilation in zip(
        inputs.shape[1:-1], layer.kernel_size, layer.strides[-layer.rank :], layer.dilation_rate, strict=True
    ):
        extent = (size - 1) * dilation + 1
        output = -(-length // stride) if layer.padding == "same" else (length - extent) // stride + 1
        before = after = 0
        if layer.padding == "same":
            total = max((output - 1) * stride + extent - length, 0)
            before, after = total // 2, total - total // 2
        if layer.padding == "causal":
            before, output = extent - 1, (length - 1) // stride + 1
        pads.append((before, after))
        lengths.append(output)
    inputs = np.pad(inputs, [(0, 0), *pads, (0, 0)])
    rows = []
    for sample in inputs:
        for position in itertools.product(*map(range, lengths)):
            row = []
            for offset in itertools.product(*map(range, layer.kernel_size)):
                steps = zip(position, layer.strides[-layer.rank :], offset, layer.dilation_rate, strict=True)
                row.append(sample[tuple(p * stride + o * dilation for p, stride, o, dilation in steps)])
            rows.append(row)
    return np.asarray(rows)


def conv(layer, inputs, kernel="kernel"):
    """A group's channels of every patch."""
    rows = patches(layer, inputs)
    groups, size = layer.groups, rows.shape[1]
    rows = rows.reshape(len(rows), size, groups, -1).transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)
    return {kernel: (rows, lambda array: array.reshape(rows.shape[-1], groups, -1).transpose(1, 0, 2))}


def depthwise(layer, inputs, kernel="kernel"):
    """Every channel is a group."""
    rows = patches(layer, inputs)
    return {kernel: (rows.transpose(2, 0, 1), lambda array: array.reshape(rows.shape[1], rows.shape[2], -1).swapaxes(0, 1))}


def separable(layer, inputs):
    """The depthwise kernel reads patches; the pointwise kernel, what comes of them."""
    rows = patches(layer, inputs).astype("float64")
    kernel = to_numpy(layer.depthwise_kernel).reshape(rows.shape[1], rows.shape[2], -1)
    between = np.einsum("rkc,kcm->rcm", rows, kernel).reshape(1, len(rows), -1)
    return {
        **depthwise(layer, inputs, "depthwise_kernel"),
        "pointwise_kernel": (between, lambda array: array.reshape(1, *array.shape[-2:])),
    }


def transpose(layer, inputs):
    """Every pixel is a row."""
    pixels = inputs if layer.data_format == "channels_last" else np.moveaxis(inputs, 1, -1)
    rows = pixels.reshape(1, -1, pixels.shape[-1])
    return {"kernel": (rows, lambda array: array.reshape(1, -1, array.shape[-1]).swapaxes(1, 2))}


def embedding(layer, inputs, kernel="embeddings"):
    """One-hot rows; padding is left out if it is masked."""
    tokens = inputs.ravel()
    tokens = tokens[tokens != 0] if layer.mask_zero else tokens
    return {kernel: (np.eye(layer.input_dim)[tokens][None], lambda array: array[None])}


def lora(read, factors="lora_kernel"):
    """The reading of a layer with LoRA: the first factor meets what the kernel met; the second, what comes of that."""

    def read_factors(layer, inputs):
        ((rows, matrix_of),) = read(layer, inputs).values()
        first = to_numpy(getattr(layer, f"{factors}_a"))
        between = rows.astype("float64") @ matrix_of(first)
        return {
            f"{factors}_a": (rows, matrix_of),
            f"{factors}_b": (between.reshape(1, -1, first.shape[-1]), lambda array: array[None]),
        }

    return read_factors


def conv_of_groups_with_lora(layer, inputs):
    """One first factor meets the channels of all groups; each group meets its own columns of the second."""
    rows, _ = conv(layer, inputs)["kernel"]
    first = to_numpy(layer.lora_kernel_a).reshape(rows.shape[-1], -1)
    rank = first.shape[-1]
    return {
        "lora_kernel_a": (rows.reshape(1, -1, rows.shape[-1]), lambda array: array.reshape(1, -1, rank)),
        "lora_kernel_b": (rows @ first, lambda array: array.reshape(rank, layer.groups, -1).swapaxes(0, 1)),
    }


def enable_lora(layer):
    """LoRA of rank 2."""
    layer.enable_lora(2)


CASES = [
    Case("dense-fewer-rows", lambda: layers.Dense(5), (4, 7), dense),
    Case("dense-as-many-rows", lambda: layers.Dense(5), (7, 7), dense),
    Case("dense-more-rows", lambda: layers.Dense(5), (11, 7), dense),
    Case("dense-one-row", lambda: layers.Dense(5), (1, 7), dense),
    Case("dense-one-feature", lambda: layers.Dense(3), (4, 1), dense),
    Case("dense-one-unit", lambda: layers.Dense(1), (4, 7), dense),
    Case("dense-wide-output-no-bias", lambda: layers.Dense(19, use_bias=False), (4, 7), dense),
    Case("dense-tanh", lambda: layers.Dense(5, activation="tanh"), (4, 7), dense),
    Case("dense-relu", lambda: layers.Dense(5, activation="relu"), (4, 7), dense),
    Case("dense-sequence", lambda: layers.Dense(5), (2, 3, 9), dense),
    Case("dense-long-sequence", lambda: layers.Dense(5, activation="tanh"), (3, 5, 4), dense),
    Case("dense-rank-5", lambda: layers.Dense(3), (2, 2, 1, 2, 9), dense),
    Case("dense-blocked-inverse", lambda: layers.Dense(6), (70, 90), dense),
    Case("dense-lora", lambda: layers.Dense(6, activation="tanh"), (4, 7), lora(dense), prepare=enable_lora),
    Case("einsum-dense", lambda: layers.EinsumDense("ab,bc->ac", 5, bias_axes="c"), (4, 7), dense),
    Case("einsum-ellipsis", lambda: layers.EinsumDense("...x,xy->...y", 5), (2, 2, 2, 9), dense),
    Case(
        "einsum-attention-heads",
        lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 3), bias_axes="de", activation="tanh"),
        (2, 3, 7),
        dense,
    ),
    Case(
        "einsum-attention-output",
        lambda: layers.EinsumDense("abcd,cde->abe", (5, 5), bias_axes="e"),
        (3, 5, 2, 3),
        einsum((), (0, 1), (2, 3), (), (0, 1), (2,)),
    ),
    Case(
        "einsum-groups",
        lambda: layers.EinsumDense("abc,bcd->abd", (3, 4), bias_axes="bd"),
        (6, 3, 5),
        einsum((1,), (0,), (2,), (0,), (1,), (2,)),
    ),
    Case(
        "einsum-groups-of-a-sequence-transposed",
        lambda: layers.EinsumDense("abcd,ecd->aceb", (2, 3, 4)),
        (3, 4, 2, 5),
        einsum((2,), (0, 1), (3,), (1,), (2,), (0,)),
    ),
    Case(
        "einsum-lora",
        lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 3)),
        (2, 3, 7),
        lora(dense),
        prepare=enable_lora,
    ),
    Case(
        "einsum-groups-lora",
        lambda: layers.EinsumDense("abc,bcde->abde", (3, 2, 4)),
        (6, 3, 5),
        lora(einsum((1,), (0,), (2,), (0,), (1,), (2, 3))),
        prepare=enable_lora,
    ),
    Case("conv1d", lambda: layers.Conv1D(4, 3, activation="tanh"), (3, 7, 2), conv),
    Case("conv1d-causal-dilated", lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (2, 7, 2), conv),
    Case("conv1d-lora", lambda: layers.Conv1D(4, 3), (3, 7, 2), lora(conv), prepare=enable_lora),
    Case(
        "conv2d-groups-lora",
        lambda: layers.Conv2D(6, 2, groups=2),
        (2, 5, 5, 4),
        conv_of_groups_with_lora,
        prepare=enable_lora,
    ),
    Case("conv2d-same-strided", lambda: layers.Conv2D(3, 3, strides=2, padding="same"), (2, 6, 5, 2), conv),
    Case("conv2d-few-rows", lambda: layers.Conv2D(3, 3, padding="valid"), (1, 4, 4, 3), conv),
    Case("conv2d-even-kernel-no-bias", lambda: layers.Conv2D(3, (2, 4), padding="same", use_bias=False), (2, 5, 5, 2), conv),
    Case("conv2d-groups", lambda: layers.Conv2D(6, 2, groups=2), (2, 5, 5, 4), conv),
    Case("conv2d-dilated", lambda: layers.Conv2D(2, 2, dilation_rate=2, padding="same"), (2, 5, 5, 2), conv),
    Case("conv2d-channels-first", lambda: layers.Conv2D(2, 2, data_format="channels_first"), (2, 3, 5, 4), conv),
    Case("conv3d", lambda: layers.Conv3D(2, 2, strides=(1, 2, 1), padding="same"), (2, 3, 4, 3, 2), conv),
    Case("depthwise1d", lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (3, 7, 2), depthwise),
    Case(
        "depthwise2d", lambda: layers.DepthwiseConv2D(3, strides=2, padding="same", activation="tanh"), (2, 6, 5, 3), depthwise
    ),
    Case("separable1d", lambda: layers.SeparableConv1D(4, 3, padding="same", activation="tanh"), (3, 7, 2), separable),
    Case("separable2d", lambda: layers.SeparableConv2D(4, 2, depth_multiplier=2), (2, 4, 4, 2), separable),
    Case("transpose1d", lambda: layers.Conv1DTranspose(3, 3, strides=2), (3, 5, 2), transpose),
    Case("transpose2d", lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same"), (2, 3, 3, 4), transpose),
    Case("transpose3d", lambda: layers.Conv3DTranspose(2, 2), (2, 2, 3, 2, 3), transpose),
    Case("embedding", lambda: layers.Embedding(6, 4), (3, 5), embedding, vocabulary=6),
    Case("embedding-masked", lambda: layers.Embedding(6, 4, mask_zero=True), (3, 5), embedding, vocabulary=6),
    Case(
        "embedding-lora",
        lambda: layers.Embedding(6, 4),
        (3, 5),
        lora(embedding, "lora_embeddings"),
        vocabulary=6,
        prepare=enable_lora,
    ),
]
if hasattr(layers, "ReversibleEmbedding"):  # An older Keras has no such layer.
    CASES.append(Case("reversible-embedding", lambda: layers.ReversibleEmbedding(6, 4), (3, 5), embedding, vocabulary=6))

if hasattr(layers, "TernaryDense"):
    CASES.append(Case("ternary-dense", lambda: layers.TernaryDense(5), (4, 7), dense))


# Each way to read once, for laws that need not hold everywhere before each change.
OFTEN = [
    *("dense-fewer-rows", "dense-long-sequence", "dense-lora", "einsum-attention-output", "einsum-groups", "conv2d-groups"),
    *("conv2d-groups-lora", "depthwise2d", "separable2d", "transpose2d", "embedding-masked", "reversible-embedding"),
]


def each_case():
    """Parametrizes a test over the table."""
    return pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def data(case, seed=0):
    """Returns the built layer with random weights, inputs and a cotangent of its outputs."""
    random = np.random.default_rng(seed)
    layer = case.layer()
    layer.build(case.input_shape)
    case.prepare(layer)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    if case.vocabulary is None:
        inputs = random.normal(size=case.input_shape).astype("float32")
    else:
        inputs = random.integers(0, case.vocabulary, size=case.input_shape).astype("int32")
    cotangent = random.normal(size=layer.compute_output_shape(case.input_shape)).astype("float32")
    return layer, inputs, cotangent
