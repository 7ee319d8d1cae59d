"""LoRA where the table of cases does not reach: one factor alone, masks, tables in reverse, quantized layers."""

import warnings

import keras
import numpy as np
import oracle
import pytest
from cases import PRODUCTS, Case, assert_conditioned, data, enable_lora
from harness import each_mode, normal, paper_isaac, plain_and_conditioned, to_numpy
from keras import layers, ops
from models import assert_close, captured, fit, sequences, weights
from oracle import relative_error
from readings import Calling, embedding

from keras_isaac import ISAAC, capture_inputs, kernel_status


def quantized(case, mode):
    """A case of the table with its kernel quantized by `mode` before LoRA; no mode leaves it as it is."""

    def prepare(layer):
        if mode is not None:
            layer.quantize(mode)
        case.prepare(layer)

    return case._replace(prepare=prepare)


LORA = {case.id: case for case in PRODUCTS if case.prepare is enable_lora}


@pytest.mark.parametrize("trained", ["lora_kernel_a", "lora_kernel_b"])
@pytest.mark.parametrize("kind", ["dense-lora", "einsum-lora"])
def test_a_factor_that_trains_alone(kind, trained):
    layer, inputs, cotangent = data(LORA[kind])
    for name in {"lora_kernel_a", "lora_kernel_b"} - {trained}:
        getattr(layer, name).trainable = False
    key = id(getattr(layer, trained))
    reading = {key: LORA[kind].read(layer, inputs)[key]}
    assert_conditioned(layer, reading, *plain_and_conditioned(layer, inputs, cotangent), 0.3)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("mode", [None, "int8"])
def test_masked_positions_are_rows_of_neither_factor(mode):
    layer, inputs, cotangent = data(quantized(LORA["einsum-lora"], mode))
    inputs[0, 2:] = 0.0
    model = keras.Sequential([keras.Input((3, 7)), layers.Masking(), layer])
    reading = LORA["einsum-lora"].read(layer, inputs.reshape(6, 7)[[0, 1, 3, 4, 5]])
    assert_conditioned(layer, reading, *plain_and_conditioned(model, inputs, cotangent), 0.3)


@pytest.mark.skipif(not hasattr(layers, "ReversibleEmbedding"), reason="an older Keras has no such layer")
def test_a_table_in_reverse():
    table, *_ = data(Case("", lambda: layers.ReversibleEmbedding(6, 4), (3, 5), embedding, vocabulary=6, prepare=enable_lora))
    inputs, cotangent = normal((3, 4), (3, 6))
    first, second = table.lora_embeddings_a, table.lora_embeddings_b
    # The factors multiply transposed, the second one first.
    reading = {
        id(first): ((inputs @ to_numpy(second).T)[None], lambda array: array.T[None]),
        id(second): (inputs[None], lambda array: array.T[None]),
    }
    gradients = plain_and_conditioned(Calling(table, reverse=True), inputs, cotangent)
    assert_conditioned(table, reading, *gradients, 0.3)


@pytest.mark.often("*-int8-compiled")
@each_mode
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["dense-lora", "einsum-lora", "embedding-lora"])
def test_the_factors_of_a_quantized_kernel(kind, mode, compiled):
    layer, inputs, cotangent = data(quantized(LORA[kind], mode))
    reading = LORA[kind].read(layer, inputs)
    assert_conditioned(layer, reading, *plain_and_conditioned(layer, inputs, cotangent, compiled), 0.3)
    reasons = {status.path.split("/")[-1]: status.reason for status in kernel_status(layer)}
    assert {reasons[variable.name] for variable in layer.trainable_variables if id(variable) in reading} == {None}
    assert set(reasons.values()) == {None, "frozen"}


def test_float8_trains_its_kernel():
    layer = layers.Dense(6)
    layer.build((4, 8))
    layer.quantize("float8")
    inputs, cotangent = normal((4, 8), (4, 6))
    plain, conditioned = plain_and_conditioned(layer, inputs, cotangent, compiled=True)
    assert relative_error(conditioned[0], oracle.condition(inputs, plain[0], 0.3)) < 2e-5
    model = captured(paper_isaac(0.1, damping=0.3), keras.Sequential([keras.Input((8,)), layer]))
    losses = fit(model, (inputs, cotangent), epochs=5).history["loss"]
    assert losses[-1] < losses[0]


without_warnings = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")


@pytest.mark.often("int4")
@without_warnings
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_model_quantized_and_captured_in_either_order_trains_alike(mode):
    def train(prepare):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((6,), dtype="int32")
        hidden = layers.Embedding(9, 8)(tokens)
        hidden = layers.Dense(8, activation="relu")(hidden)
        model = keras.Model(tokens, layers.Dense(3)(ops.mean(hidden, axis=1)))
        prepare(model)
        model.compile(optimizer=paper_isaac(0.1, damping=0.3), loss="mse")
        fit(model, sequences(32, vocabulary=9), epochs=2)
        return weights(model)

    def quantize(model):
        model.quantize(mode)
        for layer in model.layers:
            if hasattr(layer, "enable_lora"):
                layer.enable_lora(2)

    first = train(lambda model: quantize(capture_inputs(model)))
    assert_close(train(lambda model: (quantize(model), capture_inputs(model))), first, 0)


def quantized_by(mode):
    """Marks a mode of quantization that an older Keras does not have."""
    config = f"{mode.upper()}Config"
    return pytest.param(
        mode, marks=pytest.mark.skipif(not hasattr(keras.quantizers, config), reason=f"no {config} in this Keras")
    )


@pytest.mark.parametrize("mode", [quantized_by("gptq"), quantized_by("awq")])
def test_modes_without_gradients_of_the_factors_let_other_layers_train(mode):
    """Keras refuses LoRA with the first mode, and does not use it with the second."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4, name="head")])
    quantized, head = model.layers
    make_config = getattr(keras.quantizers, f"{mode.upper()}Config")
    config = make_config(dataset=None, tokenizer=None, num_samples=1, sequence_length=8, group_size=-1)
    quantized.quantize(mode, config=config)
    if mode == "awq":
        quantized.enable_lora(2)
    capture_inputs(model).compile(optimizer=ISAAC(0.1), loss="mse")
    before = keras.ops.convert_to_numpy(head.kernel)
    x = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist for variables", UserWarning)
        model.train_on_batch(x, np.zeros((12, 4), "float32"))
    assert np.abs(keras.ops.convert_to_numpy(head.kernel) - before).max() > 0.01
    reasons = {status.reason for status in kernel_status(model) if status.trainable and status.path.startswith(quantized.path)}
    assert reasons == {"quantized"}
