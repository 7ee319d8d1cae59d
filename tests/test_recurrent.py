"""Recurrent layers and `TimeDistributed`: every kernel is conditioned once a call, on the rows of all steps."""

from collections.abc import Callable
from typing import NamedTuple

import cases
import keras
import numpy as np
import oracle
import pytest
from harness import BACKEND, paper_isaac, run, slow_but_on_torch, to_numpy
from keras import layers
from models import fit, weights, with_random_weights
from oracle import relative_error
from test_derivatives import by_inputs, gradients

from keras_isaac import ISAAC, capture_inputs, kernel_status, summary
from keras_isaac.callbacks import CurvatureMonitor

SAMPLES, STEPS, FEATURES, UNITS = 3, 5, 4, 3
# A sample without masked steps, one with masked steps before and between, one of masked steps alone.
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], "bool")


class Calling(keras.layers.Layer):
    """Calls a layer with further arguments, and joins what it returns to one tensor `[samples, numbers]`."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, inputs, training=None):
        arguments = keras.tree.map_structure(keras.ops.convert_to_tensor, self.arguments)
        results = keras.tree.flatten(self.layer(inputs, training=training, **arguments))
        shape = (keras.ops.shape(inputs)[0], -1)
        return keras.ops.concatenate([keras.ops.reshape(result, shape) for result in results], axis=-1)


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
    """Runs a cell over the steps; returns the inputs and the states that its kernels meet, and its outputs in order of time."""
    met, states, outputs = [], [], np.zeros((*inputs.shape[:2], cell.units))
    for sample in range(len(inputs)):
        h = np.zeros(cell.units) if initial_state is None else initial_state[0][sample]
        c = initial_state[-1][sample] if initial_state is not None else np.zeros(cell.units)
        for time in range(inputs.shape[1])[:: -1 if go_backwards else 1]:
            if mask is None or mask[sample, time]:
                met.append(inputs[sample, time])
                states.append(h)
                h, c = step(cell, inputs[sample, time].astype("float64"), h, c)
            outputs[sample, time] = h
    return np.array(met), np.array(states), outputs


def read(layer, inputs, mask=None, initial_state=None):
    """The rows that meet each kernel, by the variable's id, and how many of its columns they meet."""
    if isinstance(layer, Calling):
        return read(layer.layer, inputs, **layer.arguments)
    if isinstance(layer, layers.Bidirectional):
        half = None if initial_state is None else len(initial_state) // 2
        forward, backward = (None, None) if half is None else (initial_state[:half], initial_state[half:])
        return {
            **read(layer.forward_layer, inputs, mask, forward),
            **read(layer.backward_layer, inputs, mask, backward),
        }
    rows, stack = {}, isinstance(layer.cell, layers.StackedRNNCells)
    for place, cell in enumerate(layer.cell.cells if stack else [layer.cell]):
        first = initial_state[place] if stack and initial_state is not None else initial_state
        met, states, inputs = loop(cell, inputs, mask, layer.go_backwards, first)
        rows[id(cell.kernel)] = (met, None)
        rows[id(cell.recurrent_kernel)] = (states, None if getattr(cell, "reset_after", True) else 2 * cell.units)
    return rows


class Convolution(NamedTuple):
    """What `cases.patches` reads of a convolution."""

    kernel_size: tuple
    strides: tuple
    dilation_rate: tuple
    padding: str
    data_format: str

    @property
    def rank(self):
        return len(self.kernel_size)


def read_conv_lstm(layer, inputs, mask=None):
    """Patches of the inputs, and of the states, which come of those patches times the kernels."""
    if isinstance(layer, Calling):
        return read_conv_lstm(layer.layer, inputs, **layer.arguments)
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
                met = cases.patches(convolution, inputs[sample, time][None].astype("float64"))
                met, states = (each.reshape(len(each), -1) for each in (met, cases.patches(of_states, h[None])))
                i, f, g, o = np.split((met @ kernel + states @ recurrent + to_numpy(cell.bias)).reshape(*shape[:-1], -1), 4, -1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                rows[0].append(met)
                rows[1].append(states)
    return {
        id(cell.kernel): (np.concatenate(rows[0]), None),
        id(cell.recurrent_kernel): (np.concatenate(rows[1]), None),
    }


def read_steps(layer, inputs, mask=None):
    """Every step that counts gives the rows of the layer inside."""
    if isinstance(layer, Calling):
        return read_steps(layer.layer, inputs, **layer.arguments)
    wrapped, images = layer.layer, inputs[np.ones(inputs.shape[:2], "bool") if mask is None else mask]
    of_layer = cases.dense if isinstance(wrapped, layers.Dense) else cases.conv
    readings = (cases.lora(of_layer) if wrapped.lora_enabled else of_layer)(wrapped, images)
    return {id(getattr(wrapped, name)): reading for name, reading in readings.items()}


def expected(rows, plain, damping):
    """The conditioner of the paper on the columns that meet rows, or on each group of them."""
    met, columns = rows
    if callable(columns):
        return cases.expected_gradient(met, columns, plain, damping)
    matrix = plain.reshape(met.shape[-1], -1)
    result = cases.expected_gradient(met[None], lambda array: array[None], matrix[:, :columns], damping)
    return np.concatenate([result, matrix[:, result.shape[1] :]], axis=1).reshape(plain.shape)


def steps_of(wrapped, **arguments):
    """`TimeDistributed`, with a mask if there are arguments."""
    layer = layers.TimeDistributed(wrapped)
    return Calling(layer, **arguments) if arguments else layer


def with_lora(layer):
    """LoRA of rank 2, once the layer is built."""
    layer.build((SAMPLES, FEATURES))
    layer.enable_lora(2)
    return layer


class Case(NamedTuple):
    """One layer, and its reading."""

    id: str
    layer: Callable[[], keras.Layer]
    read: Callable[..., dict] = read
    shape: tuple = (SAMPLES, STEPS, FEATURES)


def states(num, seed=1):
    """Initial states, the same on every backend."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(SAMPLES, UNITS)).astype("float32") for _ in range(num)]


def stacked(**arguments):
    return layers.RNN([layers.LSTMCell(UNITS), layers.GRUCell(2), layers.SimpleRNNCell(4)], **arguments)


CASES = [
    Case("simple", lambda: layers.SimpleRNN(UNITS)),
    Case("simple-sequences", lambda: layers.SimpleRNN(UNITS, return_sequences=True)),
    Case("simple-backwards-masked", lambda: Calling(layers.SimpleRNN(UNITS, go_backwards=True), mask=MASK)),
    Case("lstm", lambda: layers.LSTM(UNITS)),
    Case("lstm-sequences-states", lambda: Calling(layers.LSTM(UNITS, return_sequences=True, return_state=True))),
    Case("lstm-backwards", lambda: layers.LSTM(UNITS, go_backwards=True, return_sequences=True)),
    Case("lstm-initial-state", lambda: Calling(layers.LSTM(UNITS, return_state=True), initial_state=states(2))),
    Case("lstm-masked", lambda: Calling(layers.LSTM(UNITS), mask=MASK, initial_state=states(2))),
    Case("lstm-implementation-1", lambda: layers.LSTM(UNITS, implementation=1)),
    Case("lstm-unrolled", lambda: layers.LSTM(UNITS, unroll=True)),
    Case("gru", lambda: layers.GRU(UNITS)),
    Case("gru-masked", lambda: Calling(layers.GRU(UNITS, return_sequences=True), mask=MASK)),
    Case("gru-reset-before", lambda: layers.GRU(UNITS, reset_after=False)),
    Case("gru-unrolled-masked", lambda: Calling(layers.GRU(UNITS, unroll=True), mask=MASK, initial_state=states(1))),
    Case("rnn", lambda: layers.RNN(layers.LSTMCell(UNITS))),
    Case("rnn-sequences-masked", lambda: Calling(layers.RNN(layers.GRUCell(UNITS), return_sequences=True), mask=MASK)),
    Case("stack", stacked),
    Case("stack-sequences-backwards", lambda: stacked(return_sequences=True, go_backwards=True)),
    Case("stack-masked", lambda: Calling(stacked(return_state=True), mask=MASK)),
    Case("stack-reset-before", lambda: layers.RNN([layers.GRUCell(3, reset_after=False), layers.GRUCell(2)])),
    Case("bidirectional", lambda: layers.Bidirectional(layers.LSTM(UNITS))),
    Case("bidirectional-sequences", lambda: layers.Bidirectional(layers.GRU(UNITS, return_sequences=True))),
    Case(
        "bidirectional-masked",
        lambda: Calling(layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True)), mask=MASK, initial_state=states(4)),
    ),
    Case(
        "conv-lstm-1d-backwards",
        lambda: layers.ConvLSTM1D(2, 3, go_backwards=True, return_sequences=True),
        read_conv_lstm,
        (2, 3, 6, 2),
    ),
    Case(
        "conv-lstm-2d-strided-masked",
        # Keras' loop on JAX broadcasts the mask of images along a wrong axis.
        lambda: Calling(
            layers.ConvLSTM2D(2, 2, strides=2, padding="same"), **({} if BACKEND == "jax" else {"mask": MASK[:2, 2:]})
        ),
        read_conv_lstm,
        (2, 3, 5, 4, 2),
    ),
    Case("conv-lstm-3d", lambda: layers.ConvLSTM3D(2, 2), read_conv_lstm, (2, 2, 3, 3, 3, 1)),
    Case("steps-dense", lambda: steps_of(layers.Dense(5, activation="tanh")), read_steps),
    Case("steps-dense-masked", lambda: steps_of(layers.Dense(5), mask=MASK), read_steps, (*MASK.shape, 2, FEATURES)),
    Case("steps-dense-lora", lambda: steps_of(with_lora(layers.Dense(5))), read_steps),
    Case("steps-conv1d-causal", lambda: steps_of(layers.Conv1D(2, 3, padding="causal")), read_steps, (2, 3, 5, 2)),
    Case("steps-conv2d-groups", lambda: steps_of(layers.Conv2D(4, 2, groups=2)), read_steps, (2, 3, 4, 3, 4)),
    Case(
        "steps-conv2d-masked",
        lambda: steps_of(layers.Conv2D(3, 3, padding="same"), mask=MASK),
        read_steps,
        (*MASK.shape, 4, 3, 2),
    ),
]


def data(case):
    """The built layer with random weights, its inputs and a cotangent of its outputs."""
    random = np.random.default_rng(0)
    layer = case.layer()
    layer.build(case.shape)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    inputs = random.normal(size=case.shape).astype("float32")
    outputs = layer.compute_output_spec(keras.KerasTensor(case.shape))
    return layer, inputs, random.normal(size=outputs.shape).astype("float32")


# Each kind of layer once. The slow tests run its other options.
OFTEN = {
    *("simple-backwards-masked", "lstm", "lstm-masked", "gru-reset-before", "stack-masked", "bidirectional-masked"),
    *("conv-lstm-2d-strided-masked", "steps-dense-masked", "steps-dense-lora", "steps-conv2d-groups"),
    "steps-conv2d-masked",
}
# JAX compiles every operation of an eager step, which takes long, and PyTorch has one mode.
EAGER = ("lstm", "gru-masked", "stack-masked", "bidirectional-masked", "conv-lstm-2d-strided-masked", "steps-conv2d-masked")


def each_case(ids, often):
    """Parametrizes by the cases of these ids, all but some of them slow."""
    params = {case.id: pytest.param(case, id=case.id, marks=[pytest.mark.slow] * (case.id not in often)) for case in CASES}
    return pytest.mark.parametrize("case", [params[name] for name in ids])


def check(case, compiled, damping=0.3):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent, compiled=compiled)
    rows = case.read(layer, inputs)
    conditioned = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=damping), compiled)
    assert relative_error(conditioned.outputs, plain.outputs) < 1e-6
    assert relative_error(conditioned.input_gradient, plain.input_gradient) < 2e-6
    found = 0
    for variable, actual, theirs in zip(layer.trainable_variables, conditioned.gradients, plain.gradients, strict=True):
        wanted = theirs
        if id(variable) in rows:
            wanted, found = expected(rows[id(variable)], theirs, damping), found + 1
            assert damping == 1e8 or relative_error(actual, theirs) > 1e-2, variable.path
        shortening = np.linalg.norm(theirs) / np.linalg.norm(wanted)
        assert relative_error(actual, wanted) < 2e-5 + 2.0**-18 * shortening, variable.path
        assert np.sum(actual * theirs) > 0, variable.path
        assert damping < 1e8 or relative_error(actual, theirs) < 1e-6, variable.path
    assert found == len(rows) > 0


@each_case([case.id for case in CASES], OFTEN)
def test_each_kernel_is_conditioned_once_on_the_rows_of_all_steps(case):
    check(case, compiled=True)


def test_quantized_steps_are_conditioned_once_too():
    """The wrapped layer is captured as well, and Keras calls it by its other name."""
    random = np.random.default_rng(0)
    inputs, cotangent = random.normal(size=(3, 4, 6)).astype("float32"), random.normal(size=(3, 4, 5)).astype("float32")
    wrapped = layers.Dense(5)
    layer = layers.TimeDistributed(wrapped)
    layer.build(inputs.shape)
    wrapped.quantize("int8")
    wrapped.enable_lora(2)
    wrapped.lora_kernel_b.assign(random.normal(size=(2, 5)))
    plain = run(layer, inputs, cotangent).gradients
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3)).gradients
    rows = inputs.reshape(12, 6)
    names = {id(wrapped.lora_kernel_a): rows, id(wrapped.lora_kernel_b): rows @ to_numpy(wrapped.lora_kernel_a)}
    for variable, ours, theirs in zip(layer.trainable_variables, actual, plain, strict=True):
        met = names.get(id(variable))
        wanted = theirs if met is None else oracle.condition(met, theirs, 0.3)
        assert relative_error(ours, wanted) < 2e-5, variable.path


@each_case(EAGER, ["lstm"] if BACKEND == "tensorflow" else [])
def test_so_it_is_in_an_eager_step(case):
    check(case, compiled=False)


@each_case(EAGER, ["lstm"])
@pytest.mark.parametrize("damping", [1e-4, 1e8])
def test_a_small_damping_is_accurate_and_a_huge_one_gives_the_plain_gradient(case, damping):
    check(case, compiled=True, damping=damping)


def means(rows, counts):
    """The mean of each sample's rows that count, of samples that have any."""
    return np.array([sample[mask].mean(axis=0) for sample, mask in zip(rows, counts, strict=True) if mask.any()])


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), MASK], ids=["all", "masked"])
def test_reduce_takes_the_mean_of_a_samples_steps(mask):
    arguments = {} if mask is None else {"mask": mask}
    counts = np.ones(MASK.shape, "bool") if mask is None else mask
    # Of the first state and the outputs but the last, what meets the kernel in a step that counts.
    of_states = counts if mask is None else np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], "bool")
    for make in (lambda: layers.LSTM(UNITS), lambda: layers.TimeDistributed(layers.Dense(5))):
        layer, inputs, cotangent = data(Case("", lambda make=make: Calling(make(), **arguments)))
        plain = run(layer, inputs, cotangent)
        rows = [means(inputs, counts)]
        if isinstance(layer.layer, layers.LSTM):
            outputs = loop(layer.layer.cell, inputs, mask)[2]
            states = np.concatenate([np.zeros((SAMPLES, 1, UNITS)), outputs[:, :-1]], axis=1)
            rows.append(means(states, of_states))
        actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3, weight_sharing="reduce"))
        for met, ours, theirs in zip(rows, actual.gradients, plain.gradients, strict=False):
            assert relative_error(ours, expected((met, None), theirs, 0.3)) < 1e-4


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.LSTM(UNITS), (SAMPLES, STEPS, FEATURES)),
        pytest.param(stacked, (SAMPLES, STEPS, FEATURES), marks=pytest.mark.slow),
        pytest.param(lambda: layers.ConvLSTM1D(2, 3), (3, 4, 6, 2), marks=pytest.mark.slow),
        pytest.param(lambda: steps_of(layers.Conv1D(2, 3)), (3, 4, 6, 2), marks=pytest.mark.slow),
    ],
    ids=["lstm", "stack", "conv-lstm", "steps-conv"],
)
def test_few_rows_stand_for_all(make, shape):
    layer, inputs, cotangent = data(Case("", make, shape=shape))
    capture_inputs(layer)
    every, enough, few = (
        run(layer, inputs, cotangent, paper_isaac(damping=0.3, max_rows=max_rows), compiled=True).gradients
        for max_rows in (None, 10_000, 5)
    )
    for of_all, of_enough, of_few in zip(every, enough, few, strict=True):
        np.testing.assert_allclose(of_enough, of_all, atol=1e-5 * np.abs(of_all).max())
        assert np.sum(of_few * of_all) > 0
    assert any(relative_error(of_few, of_all) > 1e-3 for of_all, of_few in zip(every, few, strict=True))


def test_a_relative_damping_is_in_units_of_the_rows_mean_eigenvalue():
    layer, inputs, cotangent = data(Case("", lambda: layers.LSTM(UNITS)))
    plain, rows = run(layer, inputs, cotangent), read(layer, inputs)
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.2, relative_damping=True))
    for variable, ours, theirs in zip(layer.trainable_variables[:2], actual.gradients, plain.gradients, strict=False):
        met = rows[id(variable)][0]
        damping = 0.2 * np.sum(met**2) / len(met) / min(met.shape)
        assert relative_error(ours, expected(rows[id(variable)], theirs, damping)) < 2e-5


def test_a_norm_is_that_of_the_plain_gradient():
    layer, inputs, cotangent = data(Case("", lambda: layers.LSTM(UNITS)))
    plain, rows = run(layer, inputs, cotangent), read(layer, inputs)
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.2, preserve_norm=True))
    for variable, ours, theirs in zip(layer.trainable_variables[:2], actual.gradients, plain.gradients, strict=False):
        wanted = expected(rows[id(variable)], theirs, 0.2)
        assert relative_error(ours, wanted * np.linalg.norm(theirs) / np.linalg.norm(wanted)) < 2e-5


@pytest.mark.parametrize(
    "holds_outputs", [pytest.param(True, marks=pytest.mark.slow), False], ids=["outputs-too", "derivatives-alone"]
)
@pytest.mark.parametrize(
    "make", [lambda: layers.LSTM(UNITS), pytest.param(stacked, marks=pytest.mark.slow)], ids=["lstm", "stack"]
)
def test_every_part_of_a_gradient_is_conditioned_once_where_the_loss_holds_derivatives(make, holds_outputs, monkeypatch):
    if BACKEND == "torch":
        # On a GPU, cuDNN has no second derivative.
        monkeypatch.setattr("torch.backends.cudnn.enabled", False)
    layer, inputs, cotangent = data(Case("", make))
    cotangent = keras.ops.convert_to_tensor(cotangent)

    def loss(call, x):
        # The first derivative of a linear function does not need the value of the outputs.
        function = keras.ops.square if holds_outputs else lambda outputs: outputs
        return keras.ops.sum(keras.ops.square(by_inputs(lambda x: keras.ops.sum(cotangent * function(call(x))), x)))

    plain, rows = gradients(layer, inputs, loss), read(layer, inputs)
    optimizer = paper_isaac(damping=0.3)
    optimizer.build(layer.trainable_variables)
    actual = gradients(capture_inputs(layer), inputs, loss, optimizer)
    for variable, ours, theirs in zip(layer.trainable_variables, actual, plain, strict=True):
        wanted = expected(rows[id(variable)], theirs, 0.3) if id(variable) in rows else theirs
        assert relative_error(ours, wanted) < 1e-4, variable.path
        assert id(variable) not in rows or relative_error(ours, theirs) > 1e-2, variable.path


def fixed_dropout(cell, seed=0):
    """Dropout masks that are the same on every backend, in the place of those that the cell would draw."""
    random = np.random.default_rng(seed)
    masks = [
        keras.ops.convert_to_tensor(2.0 * (random.random((SAMPLES, width)) < 0.5), "float32") for width in (FEATURES, UNITS)
    ]
    cell.get_dropout_mask, cell.get_recurrent_dropout_mask = lambda inputs: masks[0], lambda states: masks[1]
    return [keras.ops.convert_to_numpy(mask) for mask in masks]


def test_rows_are_what_a_shared_dropout_mask_leaves():
    kinds = [lambda: layers.SimpleRNN(UNITS, dropout=0.5, recurrent_dropout=0.5)]
    if BACKEND != "jax":
        # Keras does not run a stack of one cell on JAX.
        kinds.append(lambda: layers.RNN([layers.SimpleRNNCell(UNITS, dropout=0.5, recurrent_dropout=0.5)]))
    for make in kinds:
        layer = make()
        cell = getattr(layer.cell, "cells", [layer.cell])[0]
        layer = Always(layer)
        _, inputs, cotangent = data(Case("", lambda layer=layer: layer))
        masks = fixed_dropout(cell)
        plain = run(layer, inputs, cotangent)
        h, met, states = np.zeros((SAMPLES, UNITS)), [], []
        kernel, recurrent, bias = (to_numpy(each) for each in (cell.kernel, cell.recurrent_kernel, cell.bias))
        for time in range(STEPS):
            met.append(inputs[:, time] * masks[0])
            states.append(h * masks[1])
            h = np.tanh(met[-1] @ kernel + states[-1] @ recurrent + bias)
        actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3))
        assert relative_error(actual.outputs, h) < 1e-5
        for rows, ours, theirs in zip((met, states), actual.gradients, plain.gradients, strict=False):
            assert relative_error(ours, expected((np.concatenate(rows), None), theirs, 0.3)) < 2e-5


class Always(Calling):
    """Calls a layer in training, also where the caller does not say so."""

    def call(self, inputs):
        return self.layer(inputs, training=True)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: layers.LSTM(UNITS, dropout=0.4, seed=0), marks=pytest.mark.slow),
        pytest.param(lambda: layers.GRU(UNITS, recurrent_dropout=0.3, seed=0), marks=pytest.mark.slow),
        lambda: layers.SimpleRNN(UNITS, dropout=0.4, recurrent_dropout=0.3, seed=0, stateful=True),
        pytest.param(
            lambda: layers.RNN(
                [layers.SimpleRNNCell(UNITS, dropout=0.4, seed=0), layers.LSTMCell(2, recurrent_dropout=0.3, seed=1)]
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lstm", "gru", "stateful", "stack"],
)
def test_dropout_and_state_are_the_plain_layers(make):
    losses, states = [], []
    for capture in (lambda model: model, capture_inputs):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(batch_shape=(4, STEPS, FEATURES)), make(), layers.Dense(1)])
        with_random_weights(model)
        optimizer = paper_isaac(0.1, damping=1e9) if capture is capture_inputs else keras.optimizers.SGD(0.1)
        capture(model).compile(optimizer=optimizer, loss="mse")
        inputs = np.random.default_rng(1).normal(size=(8, STEPS, FEATURES)).astype("float32")
        losses.append(fit(model, (inputs, inputs[:, 0, :1]), batch_size=4, epochs=2).history["loss"])
        states.append([to_numpy(variable) for variable in model.layers[0].states or []])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert losses[1][0] != losses[1][1]


def network():
    """Every kind at once, of sequences of vectors."""
    inputs = keras.Input((STEPS, FEATURES))
    x = layers.TimeDistributed(layers.Dense(4, activation="tanh"))(layers.Masking()(inputs))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.RNN([layers.GRUCell(3), layers.SimpleRNNCell(3)], return_sequences=True)(x)
    return with_random_weights(keras.Model(inputs, layers.Dense(1, dtype="float32")(layers.GRU(3, reset_after=False)(x))))


def batch():
    """Sequences of which some are shorter."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, STEPS, FEATURES)).astype("float32")
    inputs[:3, 3:] = 0
    return inputs, np.tanh(inputs[:, 0, :1])


@slow_but_on_torch
@pytest.mark.parametrize(
    "policy",
    ["mixed_float16", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("float32", "mixed_bfloat16"))],
)
def test_training_moves_all_weights_and_the_loss_falls(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
        before = weights(model)
        capture_inputs(model).compile(optimizer=ISAAC(0.01, damping=0.1), loss="mse")
        losses = fit(model, batch(), batch_size=8, epochs=8).history["loss"]
    finally:
        keras.config.set_dtype_policy("float32")
    assert losses[-1] < losses[0]
    for ours, theirs in zip(weights(model), before, strict=True):
        assert np.all(np.isfinite(ours))
        assert np.abs(ours - theirs).max() > 1e-4


def test_the_second_step_compiles_nothing_and_the_saved_file_is_the_plain_models(count_traces, tmp_path):
    traces = count_traces()
    inputs, targets = batch()
    plain = network()
    config = plain.get_config()
    model = keras.Sequential([keras.Input(inputs.shape[1:]), traces.layer, plain])
    capture_inputs(model).compile(optimizer=paper_isaac(1e-3), loss="mse")
    model.train_on_batch(inputs, targets)
    first = traces.count
    for _ in range(2):
        model.train_on_batch(inputs, targets)
    assert traces.count == (first if BACKEND != "torch" else first + 2)
    assert plain.get_config() == config
    plain.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not any("call" in vars(layer) for layer in loaded.layers)
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), plain.predict(inputs, verbose=0), atol=1e-6)


def test_kernel_status_and_summary_show_what_is_conditioned(capsys):
    model = capture_inputs(network())
    for status in kernel_status(model):
        assert status.reason is None, status
    kinds = [status.layer for status in kernel_status(model)]
    assert kinds == ["Dense", *["LSTM"] * 4, *["RNN"] * 4, *["GRU"] * 2, "Dense"]
    rows = {status.path: (status.rows, status.num_in, status.num_out) for status in summary(model, batch_size=8)}
    assert set(rows.values()) >= {
        (8 * STEPS, 4, 12),
        (8 * STEPS, 3, 12),
        (8 * STEPS, 6, 9),
        (8 * STEPS, 3, 6),
        (8 * STEPS, 4, 4),
    }
    (noted,) = [status for status in kernel_status(model) if status.note]
    assert noted.path == model.layers[-2].cell.recurrent_kernel.path
    printed = capsys.readouterr().out
    assert all(word in printed for word in noted.note.split())


@slow_but_on_torch
def test_a_monitor_shows_the_spectra_of_the_states():
    inputs, targets = batch()
    lstm, stack = layers.LSTM(UNITS, return_sequences=True), stacked()
    model = with_random_weights(keras.Sequential([keras.Input(inputs.shape[1:]), lstm, stack, layers.Dense(1)]))
    rows = {**read(lstm, inputs), **read(stack, loop(lstm.cell, inputs)[2])}
    capture_inputs(model).compile(optimizer=paper_isaac(damping=0.2), loss="mse")
    monitor = CurvatureMonitor((inputs, targets))
    fit(model, (inputs, targets), batch_size=8, callbacks=[monitor])
    for kernel in (kernel for kernel in model.trainable_variables if id(kernel) in rows):
        met = rows[id(kernel)][0]
        eigenvalues = np.linalg.svd(met / np.sqrt(len(met)), compute_uv=False) ** 2
        name = kernel.path.removeprefix("sequential/").removesuffix("/kernel")
        measured = [monitor.history[f"{name}/{number}"][0] for number in ("effective_rank", "damped_eigenvalue")]
        wanted = [eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), eigenvalues.max() / 0.2]
        np.testing.assert_allclose(measured, wanted, rtol=2e-3)
        assert 0 < monitor.history[f"{name}/norm_ratio"][0] < 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces sequences of unknown length")
def test_sequences_of_unknown_length_are_conditioned():
    import tensorflow as tf

    layer, inputs, cotangent = data(Case("", lambda: layers.LSTM(UNITS)))
    known = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3), compiled=True)
    optimizer = paper_isaac(damping=0.3)
    optimizer.build(layer.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec([None, None, FEATURES])])
    def gradients(inputs):
        with tf.GradientTape() as tape, optimizer.conditioning():
            loss = tf.reduce_sum(layer(inputs, training=True) * cotangent)
        return tape.gradient(loss, [variable.value for variable in layer.trainable_variables])

    for ours, theirs in zip(gradients(inputs), known.gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
