"""Recurrent layers and `TimeDistributed` beyond the table of cases: options of `ISAAC`, dropout, state, whole models."""

import keras
import numpy as np
import pytest
from cases import FEATURES, MASK, SAMPLES, SEQUENCES, STEPS, UNITS, Case, assert_conditioned, data, stacked
from harness import BACKEND, gradients_by, masks_a_stack, normal, paper_isaac, run, slow_but_on_torch, to_numpy
from keras import layers
from models import assert_close, assert_only_damping_matters, captured, fit, weights, with_random_weights
from oracle import relative_error
from readings import Calling, dense, loop, lora, one_group, recurrent
from test_callbacks import expected_spectrum
from test_derivatives import check

from keras_isaac import ISAAC, capture_inputs, kernel_status, summary
from keras_isaac.callbacks import CurvatureMonitor


def sequence_data(layer, shape=SEQUENCES):
    """The layer, built, with random weights; inputs and a cotangent."""
    return data(Case("", lambda: layer, shape, recurrent))


def test_quantized_steps_are_conditioned_once_too():
    """The wrapped layer is captured as well, and Keras calls it by its other name."""
    inputs, cotangent, second = normal((3, 4, 6), (3, 4, 5), (2, 5))
    wrapped = layers.Dense(5)
    layer = layers.TimeDistributed(wrapped)
    layer.build(inputs.shape)
    wrapped.quantize("int8")
    wrapped.enable_lora(2)
    wrapped.lora_kernel_b.assign(second)
    plain, reading = run(layer, inputs, cotangent).gradients, lora(dense)(wrapped, inputs)
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3)).gradients
    assert_conditioned(layer, reading, plain, actual, 0.3)


def means(rows, counts):
    """The mean of each sample's rows that count, of samples that have any."""
    return np.array([[sample[mask].mean(axis=0) for sample, mask in zip(rows, counts, strict=True) if mask.any()]])


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), MASK], ids=["all", "masked"])
def test_reduce_takes_the_mean_of_a_samples_steps(mask):
    arguments = {} if mask is None else {"mask": mask}
    counts = np.ones(MASK.shape, "bool") if mask is None else mask
    # Of the first state and the outputs but the last, those that the kernel reads in a step that counts.
    of_states = counts if mask is None else np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], "bool")
    for inner in (layers.LSTM(UNITS), layers.TimeDistributed(layers.Dense(5))):
        layer, inputs, cotangent = sequence_data(Calling(inner, **arguments))
        reading = {id(layer.trainable_variables[0]): (means(inputs, counts), one_group)}
        if isinstance(inner, layers.LSTM):
            outputs = loop(inner.cell, inputs, mask)[2]
            states = np.concatenate([np.zeros((SAMPLES, 1, UNITS)), outputs[:, :-1]], axis=1)
            reading[id(inner.cell.recurrent_kernel)] = means(states, of_states), one_group
        plain = run(layer, inputs, cotangent)
        actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3, weight_sharing="reduce"))
        assert_conditioned(layer, reading, plain.gradients, actual.gradients, 0.3)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.LSTM(UNITS), SEQUENCES),
        pytest.param(stacked, SEQUENCES, marks=pytest.mark.slow),
        pytest.param(lambda: layers.ConvLSTM1D(2, 3), (3, 4, 6, 2), marks=pytest.mark.slow),
        pytest.param(lambda: layers.TimeDistributed(layers.Conv1D(2, 3)), (3, 4, 6, 2), marks=pytest.mark.slow),
    ],
    ids=["lstm", "stack", "conv-lstm", "steps-conv"],
)
def test_few_rows_condition_a_recurrent_kernel(make, shape):
    layer, inputs, cotangent = sequence_data(make(), shape)
    capture_inputs(layer)
    every, enough, few = (
        run(layer, inputs, cotangent, paper_isaac(damping=0.3, max_rows=max_rows), compiled=True).gradients
        for max_rows in (None, 10_000, 5)
    )
    for of_all, of_enough, of_few in zip(every, enough, few, strict=True):
        np.testing.assert_allclose(of_enough, of_all, atol=1e-5 * np.abs(of_all).max())
        assert np.sum(of_few * of_all) > 0
    assert any(relative_error(of_few, of_all) > 1e-3 for of_all, of_few in zip(every, few, strict=True))


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
    layer, inputs, cotangent = sequence_data(make())
    cotangent = keras.ops.convert_to_tensor(cotangent)

    def loss(call, x):
        # The first derivative of a linear function does not need the value of the outputs.
        function = keras.ops.square if holds_outputs else lambda outputs: outputs
        return keras.ops.sum(keras.ops.square(gradients_by(lambda x: keras.ops.sum(cotangent * function(call(x))), x)))

    check(layer, inputs, loss, recurrent(layer, inputs))


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
        layer = Calling(layer, training=True)
        _, inputs, cotangent = sequence_data(layer)
        masks = fixed_dropout(cell)
        plain = run(layer, inputs, cotangent)
        h, rows, states = np.zeros((SAMPLES, UNITS)), [], []
        kernel, recurrent, bias = (to_numpy(each) for each in (cell.kernel, cell.recurrent_kernel, cell.bias))
        for time in range(STEPS):
            rows.append(inputs[:, time] * masks[0])
            states.append(h * masks[1])
            h = np.tanh(rows[-1] @ kernel + states[-1] @ recurrent + bias)
        actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3))
        assert relative_error(actual.outputs, h) < 1e-5
        reading = {id(cell.kernel): (np.concatenate(rows)[None], one_group)}
        reading[id(cell.recurrent_kernel)] = np.concatenate(states)[None], one_group
        assert_conditioned(layer, reading, plain.gradients, actual.gradients, 0.3)


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
    def network():
        return with_random_weights(keras.Sequential([keras.Input(batch_shape=(4, STEPS, FEATURES)), make(), layers.Dense(1)]))

    inputs, targets = normal((8, STEPS, FEATURES), (8, 1))
    assert_only_damping_matters(network, (inputs, targets), batch_size=4, epochs=2)


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


@masks_a_stack
@slow_but_on_torch
@pytest.mark.parametrize(
    "policy",
    ["mixed_float16", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("float32", "mixed_bfloat16"))],
)
def test_training_moves_all_weights_and_the_loss_falls(policy):
    keras.config.set_dtype_policy(policy)
    model = network()
    before = weights(model)
    losses = fit(captured(ISAAC(0.01, damping=0.1), model), batch(), batch_size=8, epochs=8).history["loss"]
    assert losses[-1] < losses[0]
    for ours, theirs in zip(weights(model), before, strict=True):
        assert np.all(np.isfinite(ours))
        assert np.abs(ours - theirs).max() > 1e-4


@masks_a_stack
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
    reading = {**recurrent(lstm, inputs), **recurrent(stack, loop(lstm.cell, inputs)[2])}
    capture_inputs(model).compile(optimizer=paper_isaac(damping=0.2), loss="mse")
    monitor = CurvatureMonitor((inputs, targets))
    fit(model, (inputs, targets), batch_size=8, callbacks=[monitor])
    for kernel in (kernel for kernel in model.trainable_variables if id(kernel) in reading):
        (rows,) = reading[id(kernel)][0]
        name = kernel.path.removeprefix("sequential/").removesuffix("/kernel")
        measured = [monitor.history[f"{name}/{number}"][0] for number in ("effective_rank", "damped_eigenvalue")]
        np.testing.assert_allclose(measured, expected_spectrum(rows, 0.2), rtol=2e-3)
        assert 0 < monitor.history[f"{name}/norm_ratio"][0] < 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces sequences of unknown length")
def test_sequences_of_unknown_length_are_conditioned():
    import tensorflow as tf

    layer, inputs, cotangent = sequence_data(layers.LSTM(UNITS))
    known = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3), compiled=True)
    optimizer = paper_isaac(damping=0.3)
    optimizer.build(layer.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec([None, None, FEATURES])])
    def gradients(inputs):
        with tf.GradientTape() as tape, optimizer.conditioning():
            loss = tf.reduce_sum(layer(inputs, training=True) * cotangent)
        return tape.gradient(loss, [variable.value for variable in layer.trainable_variables])

    assert_close(list(map(to_numpy, gradients(inputs))), known.gradients, 1e-5)
