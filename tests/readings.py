"""The input rows of each kernel of a layer, in NumPy.

A reading takes a layer and its inputs. For each conditioned kernel, by the `id` of the variable, it returns the rows
`[groups, rows, in]`, and a function that reshapes an array of the kernel's shape to `[groups, in, out]`. Entries of the kernel
that this function leaves out keep their plain gradient.
"""

import itertools
import math
from typing import NamedTuple

import keras
import numpy as np
from harness import to_numpy
from keras import layers


def one_group(array):
    """`[in, *out]` -> `[1, in, out]`."""
    return array.reshape(1, len(array), -1)


def dense(layer, inputs, kernel="kernel"):
    """Every position is a row."""
    rows = inputs.reshape(1, -1, inputs.shape[-1])
    return {id(getattr(layer, kernel)): (rows, lambda array: array.reshape(1, inputs.shape[-1], -1))}


def einsum(group, rows, contracted, kernel_group, kernel_in, kernel_out, kernel="kernel"):
    """Axes of the inputs that are groups, rows and contracted; axes of the kernel that are groups, inputs and outputs."""

    def read(layer, inputs):
        def part(array, *axes):
            ordered = np.transpose(array, [axis for kind in axes for axis in kind])
            sizes = [math.prod(array.shape[axis] for axis in kind) for kind in axes]
            return ordered.reshape(sizes)

        reading = part(inputs, group, rows, contracted), lambda array: part(array, kernel_group, kernel_in, kernel_out)
        return {id(getattr(layer, kernel)): reading}

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


def conv(layer, inputs):
    """A group's channels of every patch."""
    rows = patches(layer, inputs)
    groups, size = layer.groups, rows.shape[1]
    rows = rows.reshape(len(rows), size, groups, -1).transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)
    return {id(layer.kernel): (rows, lambda array: array.reshape(rows.shape[-1], groups, -1).transpose(1, 0, 2))}


def depthwise(layer, inputs, kernel="kernel"):
    """Every channel is a group."""
    rows = patches(layer, inputs)
    matrix_of = lambda array: array.reshape(rows.shape[1], rows.shape[2], -1).swapaxes(0, 1)  # noqa: E731
    return {id(getattr(layer, kernel)): (rows.transpose(2, 0, 1), matrix_of)}


def separable(layer, inputs):
    """The depthwise kernel reads patches; the pointwise kernel, their products with it."""
    rows = patches(layer, inputs).astype("float64")
    kernel = to_numpy(layer.depthwise_kernel).reshape(rows.shape[1], rows.shape[2], -1)
    between = np.einsum("rkc,kcm->rcm", rows, kernel).reshape(1, len(rows), -1)
    pointwise = between, lambda array: array.reshape(1, *array.shape[-2:])
    return {**depthwise(layer, inputs, "depthwise_kernel"), id(layer.pointwise_kernel): pointwise}


def transpose(layer, inputs):
    """Every pixel is a row."""
    pixels = inputs if layer.data_format == "channels_last" else np.moveaxis(inputs, 1, -1)
    rows = pixels.reshape(1, -1, pixels.shape[-1])
    return {id(layer.kernel): (rows, lambda array: array.reshape(1, -1, array.shape[-1]).swapaxes(1, 2))}


def embedding(layer, inputs):
    """One-hot rows; padding is left out if it is masked."""
    tokens = inputs.ravel()
    tokens = tokens[tokens != 0] if layer.mask_zero else tokens
    return {id(layer.embeddings): (np.eye(layer.input_dim)[tokens][None], one_group)}


def lora(read, factors="lora_kernel"):
    """The reading of a layer with LoRA: the first factor has the kernel's rows; the second, their products with the first."""

    def read_factors(layer, inputs):
        ((rows, matrix_of),) = read(layer, inputs).values()
        a, b = (getattr(layer, f"{factors}_{factor}") for factor in "ab")
        between = (rows.astype("float64") @ matrix_of(to_numpy(a))).reshape(1, -1, a.shape[-1])
        return {id(a): (rows, matrix_of), id(b): (between, one_group)}

    return read_factors


def conv_of_groups_with_lora(layer, inputs):
    """The first factor reads the channels of all groups; each group has its own columns of the second."""
    ((rows, _),) = conv(layer, inputs).values()
    first = to_numpy(layer.lora_kernel_a).reshape(rows.shape[-1], -1)
    rank = first.shape[-1]
    return {
        id(layer.lora_kernel_a): (rows.reshape(1, -1, rows.shape[-1]), lambda array: array.reshape(1, -1, rank)),
        id(layer.lora_kernel_b): (rows @ first, lambda array: array.reshape(rank, layer.groups, -1).swapaxes(0, 1)),
    }


# Recurrent layers and `TimeDistributed`: the rows of all steps that the mask does not leave out.


class Calling(keras.layers.Layer):
    """Calls a layer with further arguments, and joins what it returns to one tensor `[samples, numbers]`."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)

    def call(self, inputs, training=None):
        def tensor(x):
            return keras.ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x

        arguments = keras.tree.map_structure(tensor, {"training": training, **self.arguments})
        results = keras.tree.flatten(self.layer(inputs, **arguments))
        shape = (keras.ops.shape(inputs)[0], -1)
        return keras.ops.concatenate([keras.ops.reshape(result, shape) for result in results], axis=-1)


def with_arguments(read):
    """A reading of a layer that may be inside `Calling`."""

    def read_layer(layer, inputs, **arguments):
        return read(layer.layer, inputs, **layer.arguments) if isinstance(layer, Calling) else read(layer, inputs, **arguments)

    return read_layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(cell, x, h, c):
    """One step of a cell in float64: the next state and carry."""
    kernel, recurrent, bias = (to_numpy(getattr(cell, name)) for name in ("kernel", "recurrent_kernel", "bias"))
    if isinstance(cell, layers.SimpleRNNCell):
        return np.tanh(x @ kernel + bias + h @ recurrent), c
    if isinstance(cell, layers.LSTMCell):
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    input_bias, recurrent_bias = bias if cell.reset_after else (bias, np.zeros(bias.shape))
    x_z, x_r, x_h = np.split(x @ kernel + input_bias, 3)
    h_z, h_r, h_h = np.split(h @ recurrent + recurrent_bias, 3)
    z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
    h_h = r * h_h if cell.reset_after else (r * h) @ recurrent[:, 2 * cell.units :]
    return z * h + (1 - z) * np.tanh(x_h + h_h), c


def loop(cell, inputs, mask=None, go_backwards=False, initial_state=None):
    """Runs a cell over the steps; returns the inputs and the states that its kernels read, and its outputs in order of time."""
    rows, states, outputs = [], [], np.zeros((*inputs.shape[:2], cell.units))
    for sample in range(len(inputs)):
        h = np.zeros(cell.units) if initial_state is None else initial_state[0][sample]
        c = initial_state[-1][sample] if initial_state is not None else np.zeros(cell.units)
        for time in range(inputs.shape[1])[:: -1 if go_backwards else 1]:
            if mask is None or mask[sample, time]:
                rows.append(inputs[sample, time])
                states.append(h)
                h, c = step(cell, inputs[sample, time].astype("float64"), h, c)
            outputs[sample, time] = h
    return np.array(rows), np.array(states), outputs


@with_arguments
def recurrent(layer, inputs, mask=None, initial_state=None):
    """The kernel of each cell reads its inputs, the recurrent kernel its states."""
    if isinstance(layer, layers.Bidirectional):
        half = None if initial_state is None else len(initial_state) // 2
        forward, backward = (None, None) if half is None else (initial_state[:half], initial_state[half:])
        return {
            **recurrent(layer.forward_layer, inputs, mask=mask, initial_state=forward),
            **recurrent(layer.backward_layer, inputs, mask=mask, initial_state=backward),
        }
    reading, stack = {}, isinstance(layer.cell, layers.StackedRNNCells)
    for place, cell in enumerate(layer.cell.cells if stack else [layer.cell]):
        first = initial_state[place] if stack and initial_state is not None else initial_state
        rows, states, inputs = loop(cell, inputs, mask, layer.go_backwards, first)
        # The last columns of a GRU that resets before the product read other rows, and are plain.
        columns = None if getattr(cell, "reset_after", True) else 2 * cell.units
        reading[id(cell.kernel)] = rows[None], one_group
        reading[id(cell.recurrent_kernel)] = states[None], lambda array, columns=columns: array[None, :, :columns]
    return reading


class Convolution(NamedTuple):
    """What `patches` reads of a convolution."""

    kernel_size: tuple
    strides: tuple
    dilation_rate: tuple
    padding: str
    data_format: str

    @property
    def rank(self):
        return len(self.kernel_size)


@with_arguments
def conv_lstm(layer, inputs, mask=None):
    """Patches of the inputs, and of the states, which are computed from those patches and the kernels."""
    cell, ones = layer.cell, (1,) * layer.cell.rank
    convolution = Convolution(cell.kernel_size, cell.strides, cell.dilation_rate, cell.padding, cell.data_format)
    of_states = Convolution(cell.kernel_size, ones, ones, "same", "channels_last")
    kernel, recurrent = (to_numpy(each).reshape(-1, 4 * cell.filters) for each in (cell.kernel, cell.recurrent_kernel))
    shape = cell.compute_output_shape((1, *inputs.shape[2:]))[0][1:]
    shape = shape if cell.data_format == "channels_last" else (*shape[1:], shape[0])
    rows = ([], [])
    for sample in range(len(inputs)):
        h, c = np.zeros((2, *shape))
        for time in range(inputs.shape[1])[:: -1 if layer.go_backwards else 1]:
            if mask is None or mask[sample, time]:
                of_inputs = patches(convolution, inputs[sample, time][None].astype("float64"))
                of_inputs, states = (each.reshape(len(each), -1) for each in (of_inputs, patches(of_states, h[None])))
                gates = of_inputs @ kernel + states @ recurrent + to_numpy(cell.bias)
                i, f, g, o = np.split(gates.reshape(*shape[:-1], -1), 4, -1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                rows[0].append(of_inputs)
                rows[1].append(states)

    def matrix_of(array):
        return array.reshape(1, -1, 4 * cell.filters)

    kernels = cell.kernel, cell.recurrent_kernel
    return {id(kernel): (np.concatenate(each)[None], matrix_of) for kernel, each in zip(kernels, rows, strict=True)}


@with_arguments
def time_distributed(layer, inputs, mask=None):
    """Every step that counts gives the rows of the layer inside."""
    wrapped, steps = layer.layer, inputs[np.ones(inputs.shape[:2], "bool") if mask is None else mask]
    read = dense if isinstance(wrapped, layers.Dense) else conv
    if wrapped.lora_enabled:
        read = lora(dense) if read is dense else conv_of_groups_with_lora
    return read(wrapped, steps)
