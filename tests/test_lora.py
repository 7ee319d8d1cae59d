"""LoRA where the table of cases does not reach: one factor alone, masks, tables in reverse, quantized layers."""

import warnings

import keras
import numpy as np
import oracle
import pytest
from harness import IS_COMPILED, each_mode, paper_isaac, run, to_numpy
from keras import layers, ops
from models import captured, fit, keras_hub
from oracle import relative_error

from keras_isaac import ISAAC, capture_inputs, kernel_status


def with_lora(layer, input_shape, mode=None, seed=0):
    """The layer, quantized by `mode`, with LoRA of rank 2 and random weights."""
    random = np.random.default_rng(seed)
    layer.build(input_shape)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    if mode is not None:
        layer.quantize(mode)
    layer.enable_lora(2)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape))
    return layer


def plain_and_conditioned(layer, inputs, cotangent, compiled=IS_COMPILED, **options):
    """Passes of the layer by name of the variable, plain and captured."""
    plain = run(layer, inputs, cotangent, compiled=compiled)
    conditioned = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=0.3, **options), compiled)
    assert relative_error(conditioned.outputs, plain.outputs) < 1e-5
    if plain.input_gradient is not None:
        assert relative_error(conditioned.input_gradient, plain.input_gradient) < 1e-5
    names = [variable.name for variable in layer.trainable_variables]
    return tuple(dict(zip(names, each.gradients, strict=True)) for each in (plain, conditioned))


def data(*shapes, seed=1):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize("trained", ["lora_kernel_a", "lora_kernel_b"])
@pytest.mark.parametrize(
    "layer", [lambda: layers.Dense(5), lambda: layers.EinsumDense("ab,bc->ac", 5)], ids=["dense", "einsum"]
)
def test_a_factor_that_trains_alone(layer, trained):
    layer = with_lora(layer(), (4, 7))
    for name in {"lora_kernel_a", "lora_kernel_b"} - {trained}:
        getattr(layer, name).trainable = False
    inputs, cotangent = data((4, 7), (4, 5))
    plain, conditioned = plain_and_conditioned(layer, inputs, cotangent)
    rows = inputs if trained == "lora_kernel_a" else inputs @ to_numpy(layer.lora_kernel_a)
    assert set(plain) - {"bias"} == {trained}
    assert relative_error(conditioned[trained], oracle.condition(rows, plain[trained], 0.3)) < 2e-5


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("mode", [None, "int8"])
def test_rows_of_both_factors_are_those_that_count(mode):
    layer = with_lora(layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (2, 4, 7), mode)
    inputs, cotangent = data((2, 4, 7), (2, 4, 2, 3))
    inputs[0, 2:] = 0.0
    masking = layers.Masking()
    names = [variable.name for variable in layer.trainable_variables]
    plain = run(layer, inputs, cotangent).gradients
    model = capture_inputs(keras.Sequential([keras.Input((4, 7)), masking, layer]))
    conditioned = dict(zip(names, run(model, inputs, cotangent, paper_isaac(damping=0.3)).gradients, strict=True))
    rows = inputs.reshape(8, 7)[[0, 1, 4, 5, 6, 7]]
    first = to_numpy(layer.lora_kernel_a)
    between = (rows @ first.reshape(7, 4)).reshape(12, 2)
    plain = dict(zip(names, plain, strict=True))
    expected = oracle.condition(rows, plain["lora_kernel_a"].reshape(7, 4), 0.3)
    assert relative_error(conditioned["lora_kernel_a"].reshape(7, 4), expected) < 2e-5
    assert relative_error(conditioned["lora_kernel_b"], oracle.condition(between, plain["lora_kernel_b"], 0.3)) < 2e-5


@pytest.mark.skipif(not hasattr(layers, "ReversibleEmbedding"), reason="an older Keras has no such layer")
def test_a_table_in_reverse():
    layer = with_lora(layers.ReversibleEmbedding(6, 4), (3, 5))
    capture_inputs(layer)
    inputs, cotangent = data((3, 4), (3, 6))

    class Reverse(layers.Layer):
        def __init__(self):
            super().__init__()
            self.table = layer

        def call(self, inputs):
            return self.table(inputs, reverse=True)

    reverse = Reverse()
    reverse.build((3, 4))
    plain, conditioned = (
        run(reverse, inputs, cotangent, optimizer).gradients for optimizer in (None, paper_isaac(damping=0.3))
    )
    first, second = to_numpy(layer.lora_embeddings_a), to_numpy(layer.lora_embeddings_b)
    assert first.shape == plain[0].shape
    rows = inputs @ second.T
    assert relative_error(conditioned[0], oracle.condition(rows, plain[0].T, 0.3).T) < 2e-5
    assert relative_error(conditioned[1], oracle.condition(inputs, plain[1].T, 0.3).T) < 2e-5


QUANTIZED = {
    "dense": (lambda: layers.Dense(6, activation="tanh"), (4, 8)),
    "einsum": (lambda: layers.EinsumDense("ab,bc->ac", 6), (4, 8)),
    "embedding": (lambda: layers.Embedding(8, 6), (4,)),
}


@pytest.mark.often("*-int8-compiled")
@each_mode
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_factors_beside_a_quantized_kernel(kind, mode, compiled):
    layer, shape = QUANTIZED[kind]
    layer = with_lora(layer(), shape, mode)
    inputs, cotangent = data(shape, (4, 6))
    rows, name = inputs, "lora_kernel"
    if kind == "embedding":
        inputs, name = np.array([1, 3, 3, 5], "int32"), "lora_embeddings"
        rows = np.eye(8)[inputs]
    plain, conditioned = plain_and_conditioned(layer, inputs, cotangent, compiled)
    first, second = (getattr(layer, f"{name}_{factor}") for factor in "ab")
    between = rows @ to_numpy(first)
    assert relative_error(conditioned[first.name], oracle.condition(rows, plain[first.name], 0.3)) < 2e-5
    assert relative_error(conditioned[second.name], oracle.condition(between, plain[second.name], 0.3)) < 2e-5
    assert relative_error(conditioned[second.name], plain[second.name]) > 1e-2
    reasons = {status.path.split("/")[-1]: status.reason for status in kernel_status(layer)}
    assert reasons[first.name] is reasons[second.name] is None
    assert set(reasons.values()) == {None, "frozen"}


def test_float8_trains_its_kernel():
    layer = layers.Dense(6)
    layer.build((4, 8))
    layer.quantize("float8")
    inputs, cotangent = data((4, 8), (4, 6))
    plain, conditioned = (
        run(each, inputs, cotangent, optimizer, compiled=True).gradients[0]
        for each, optimizer in ((layer, None), (capture_inputs(layer), paper_isaac(damping=0.3)))
    )
    assert relative_error(conditioned, oracle.condition(inputs, plain, 0.3)) < 2e-5
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
        random = np.random.default_rng(0)
        fit(model, (random.integers(0, 9, (32, 6)), random.normal(size=(32, 3))), epochs=2)
        return [to_numpy(weight) for weight in model.trainable_variables]

    def quantize(model):
        model.quantize(mode)
        for layer in model.layers:
            if hasattr(layer, "enable_lora"):
                layer.enable_lora(2)

    first = train(lambda model: quantize(capture_inputs(model)))
    second = train(lambda model: (quantize(model), capture_inputs(model)))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@without_warnings
def test_a_quantized_backbone_trains():
    hub = keras_hub()
    keras.utils.set_random_seed(0)
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=16, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=6, dropout=0.0
    )
    backbone.quantize("int8")
    backbone.enable_lora(2)
    inputs = backbone.input
    model = capture_inputs(keras.Model(inputs, layers.Dense(3)(backbone(inputs)[:, -1])))
    trained = [status for status in kernel_status(model) if status.trainable]
    assert len(trained) > 2
    assert [status.path for status in trained if status.reason] == []
    model.compile(optimizer=paper_isaac(0.1, damping=0.3), loss="mse")
    random = np.random.default_rng(0)
    tokens = {"token_ids": random.integers(0, 16, (8, 6)), "padding_mask": np.ones((8, 6), "int32")}
    losses = fit(model, (tokens, random.normal(size=(8, 3))), epochs=4).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_modes_that_keep_no_gradient_for_factors_train_beside_the_rest(mode):
    """Keras refuses LoRA beside the one, and leaves it out of the call of the other."""
    if not hasattr(keras.quantizers, "AWQConfig"):
        pytest.skip("of a later Keras")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4, name="head")])
    quantized, head = model.layers
    make_config = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}[mode]
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
