"""The table of cases: one row per layer configuration. Every invariant in `test_layers.py` is tested on every row."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import oracle
import pytest
from harness import BACKEND, masks_a_stack
from keras import layers
from oracle import relative_error
from readings import (
    Calling,
    conv,
    conv_lstm,
    conv_of_groups_with_lora,
    dense,
    depthwise,
    einsum,
    embedding,
    lora,
    recurrent,
    separable,
    time_distributed,
    transpose,
)


class Case(NamedTuple):
    """One layer, the shape of its inputs, and its reading (see `readings.py`); tokens if there is a `vocabulary`."""

    id: str
    layer: Callable[[], keras.Layer]
    input_shape: tuple
    read: Callable[..., dict]
    vocabulary: int | None = None
    prepare: Callable[[keras.Layer], None] = lambda layer: None


def enable_lora(layer):
    """LoRA of rank 2."""
    layer.enable_lora(2)


PRODUCTS = [
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
    PRODUCTS.append(Case("reversible-embedding", lambda: layers.ReversibleEmbedding(6, 4), (3, 5), embedding, vocabulary=6))

if hasattr(layers, "TernaryDense"):
    PRODUCTS.append(Case("ternary-dense", lambda: layers.TernaryDense(5), (4, 7), dense))

SAMPLES, STEPS, FEATURES, UNITS = 3, 5, 4, 3
SEQUENCES = (SAMPLES, STEPS, FEATURES)
# A sample without masked steps, one with masked steps before and between, one of masked steps alone.
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], "bool")


def states(num, seed=1):
    """Initial states, the same on every backend."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(SAMPLES, UNITS)).astype("float32") for _ in range(num)]


def stacked(**arguments):
    return layers.RNN([layers.LSTMCell(UNITS), layers.GRUCell(2), layers.SimpleRNNCell(4)], **arguments)


def steps_of(layer):
    return layers.TimeDistributed(layer)


def cell_case(case_id, layer):
    return Case(case_id, layer, SEQUENCES, recurrent)


def called(case_id, layer, input_shape=SEQUENCES, read=recurrent, **arguments):
    return Case(case_id, lambda: Calling(layer(), **arguments), input_shape, read)


RECURRENT = [
    cell_case("simple", lambda: layers.SimpleRNN(UNITS)),
    cell_case("simple-sequences", lambda: layers.SimpleRNN(UNITS, return_sequences=True)),
    cell_case("lstm", lambda: layers.LSTM(UNITS)),
    cell_case("lstm-backwards", lambda: layers.LSTM(UNITS, go_backwards=True, return_sequences=True)),
    cell_case("lstm-implementation-1", lambda: layers.LSTM(UNITS, implementation=1)),
    cell_case("lstm-unrolled", lambda: layers.LSTM(UNITS, unroll=True)),
    cell_case("gru", lambda: layers.GRU(UNITS)),
    cell_case("gru-reset-before", lambda: layers.GRU(UNITS, reset_after=False)),
    cell_case("rnn", lambda: layers.RNN(layers.LSTMCell(UNITS))),
    cell_case("stack", stacked),
    cell_case("stack-backwards", lambda: stacked(return_sequences=True, go_backwards=True)),
    cell_case("stack-reset-before", lambda: layers.RNN([layers.GRUCell(3, reset_after=False), layers.GRUCell(2)])),
    cell_case("bidirectional", lambda: layers.Bidirectional(layers.LSTM(UNITS))),
    cell_case("bidirectional-sequences", lambda: layers.Bidirectional(layers.GRU(UNITS, return_sequences=True))),
    Case("conv-lstm-1d", lambda: layers.ConvLSTM1D(2, 3, go_backwards=True, return_sequences=True), (2, 3, 6, 2), conv_lstm),
    Case("conv-lstm-3d", lambda: layers.ConvLSTM3D(2, 2), (2, 2, 3, 3, 3, 1), conv_lstm),
    Case("steps-dense", lambda: steps_of(layers.Dense(5, activation="tanh")), SEQUENCES, time_distributed),
    Case(
        "steps-dense-lora",
        lambda: steps_of(layers.Dense(5)),
        SEQUENCES,
        time_distributed,
        prepare=lambda layer: layer.layer.enable_lora(2),
    ),
    Case("steps-conv1d-causal", lambda: steps_of(layers.Conv1D(2, 3, padding="causal")), (2, 3, 5, 2), time_distributed),
    Case("steps-conv2d-groups", lambda: steps_of(layers.Conv2D(4, 2, groups=2)), (2, 3, 4, 3, 4), time_distributed),
    Case(
        "steps-conv2d-groups-lora",
        lambda: steps_of(layers.Conv2D(4, 2, groups=2)),
        (2, 3, 4, 3, 4),
        time_distributed,
        prepare=lambda layer: layer.layer.enable_lora(2),
    ),
]

CASES = PRODUCTS + RECURRENT

# Layers that their caller gives a mask or states, or whose states it uses.
CALLED = [
    called("simple-backwards-masked", lambda: layers.SimpleRNN(UNITS, go_backwards=True), mask=MASK),
    called("lstm-sequences-states", lambda: layers.LSTM(UNITS, return_sequences=True, return_state=True)),
    called("lstm-initial-state", lambda: layers.LSTM(UNITS, return_state=True), initial_state=states(2)),
    called("lstm-masked", lambda: layers.LSTM(UNITS), mask=MASK, initial_state=states(2)),
    called("gru-masked", lambda: layers.GRU(UNITS, return_sequences=True), mask=MASK),
    called("gru-unrolled-masked", lambda: layers.GRU(UNITS, unroll=True), mask=MASK, initial_state=states(1)),
    called("rnn-sequences-masked", lambda: layers.RNN(layers.GRUCell(UNITS), return_sequences=True), mask=MASK),
    called("stack-masked", lambda: stacked(return_state=True), mask=MASK),
    called(
        "bidirectional-masked",
        lambda: layers.Bidirectional(layers.LSTM(UNITS, return_sequences=True)),
        mask=MASK,
        initial_state=states(4),
    ),
    called(
        "conv-lstm-2d-strided-masked",
        lambda: layers.ConvLSTM2D(2, 2, strides=2, padding="same"),
        (2, 3, 5, 4, 2),
        conv_lstm,
        # Keras' loop on JAX broadcasts the mask of images along a wrong axis.
        **({} if BACKEND == "jax" else {"mask": MASK[:2, 2:]}),
    ),
    called("steps-dense-masked", lambda: steps_of(layers.Dense(5)), (*MASK.shape, 2, FEATURES), time_distributed, mask=MASK),
    called(
        "steps-conv2d-masked",
        lambda: steps_of(layers.Conv2D(3, 3, padding="same")),
        (*MASK.shape, 4, 3, 2),
        time_distributed,
        mask=MASK,
    ),
]
# Further options of a recurrent layer, each of which takes long to compile.
RARE = {
    *("simple", "simple-sequences", "lstm-backwards", "lstm-implementation-1", "lstm-unrolled", "gru", "rnn"),
    *("stack-backwards", "stack-reset-before", "bidirectional-sequences", "conv-lstm-3d", "steps-dense", "steps-conv1d-causal"),
    *("lstm-sequences-states", "lstm-initial-state", "gru-masked", "gru-unrolled-masked", "rnn-sequences-masked"),
}

# One case of each kind, for what the quick tests need not check of every case.
OFTEN = [
    *("dense-fewer-rows", "dense-long-sequence", "dense-lora", "einsum-attention-output", "einsum-groups", "conv2d-groups"),
    *("conv2d-groups-lora", "depthwise2d", "separable2d", "transpose2d", "embedding-masked", "reversible-embedding"),
    *("lstm", "steps-conv2d-groups"),
]


def each_case(cases=tuple(CASES)):
    """Parametrizes a test over the table, or over some of its rows."""
    marks = {"stack-masked": masks_a_stack, **dict.fromkeys(RARE, pytest.mark.slow)}
    params = [pytest.param(case, id=case.id, marks=marks.get(case.id, ())) for case in cases]
    return pytest.mark.parametrize("case", params)


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
    outputs = layer.compute_output_spec(keras.KerasTensor(case.input_shape, inputs.dtype.name))
    # Of few digits, so that the gradient of a bias is the same in any order of its sum. On TensorFlow, oneDNN fuses it with the
    # gradient of a convolution's kernel in some traces of a graph and not in others (in none with TF_ENABLE_ONEDNN_OPTS=0).
    return layer, inputs, np.round(64 * random.normal(size=outputs.shape)).astype("float32") / 64


def relative_unit(rows):
    """The mean eigenvalue of the rows' covariance, by which a relative damping is multiplied."""
    return np.sum(np.asarray(rows, "float64") ** 2) / len(rows) / min(rows.shape)


def expected_gradient(rows, matrix_of, plain_gradient, damping, relative_damping=False, preserve_norm=False):
    """The plain gradient of a kernel, conditioned on rows in float64, in the kernel's shape."""
    plain_gradient = np.asarray(plain_gradient, "float64")
    places = matrix_of(np.arange(plain_gradient.size).reshape(plain_gradient.shape))
    result = plain_gradient.flatten()
    for group_rows, group_places in zip(rows, places, strict=True):
        own = damping * relative_unit(group_rows) if relative_damping else damping
        result[group_places] = oracle.condition(group_rows, result[group_places], own)
    if preserve_norm:
        inside = places.ravel()
        result[inside] *= np.linalg.norm(plain_gradient.ravel()[inside]) / np.linalg.norm(result[inside])
    return result.reshape(plain_gradient.shape)


def assert_conditioned(layer, reading, plain, actual, damping, tolerance=2e-5, **options):
    """The gradients of the kernels in `reading` are the oracle's, and those of all other variables the plain ones."""
    assert set(reading) <= {id(variable) for variable in layer.trainable_variables}
    assert reading
    for variable, ours, theirs in zip(layer.trainable_variables, actual, plain, strict=True):
        expected = expected_gradient(*reading[id(variable)], theirs, damping, **options) if id(variable) in reading else theirs
        # Where conditioning shortens the gradient, what float32 lost of the longer one is part of the shorter.
        shortening = np.linalg.norm(theirs) / np.linalg.norm(expected)
        assert relative_error(ours, expected) < tolerance + 2.0**-18 * shortening, variable.path
        if id(variable) in reading and 0.1 <= damping <= 0.3:
            assert relative_error(ours, theirs) > 1e-2, variable.path
