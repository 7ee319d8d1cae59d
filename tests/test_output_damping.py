"""The two-parameter method: `output_damping` in each layer that is a product, against its float64 formula."""

import cases
import keras
import numpy as np
import oracle
import pytest
from harness import each_mode, paper_isaac, run
from keras import layers
from oracle import relative_error

from keras_isaac import ISAAC, capture_inputs

DAMPING, OUTPUT_DAMPING = 0.3, 40.0


def expected(rows, matrix_of, plain, output_gradients):
    """ζ = λ (λI + XᵀX/r)⁻¹ ∇ μ (μI + rGᵀG)⁻¹ for each group of the rows X and the output's gradients G."""
    plain = cases.expected_gradient(rows, matrix_of, plain, DAMPING)
    places = matrix_of(np.arange(plain.size).reshape(plain.shape))
    result = np.zeros(plain.size)
    for group, group_places in zip(output_gradients, places, strict=True):
        # The empirical Fisher matrix has the gradients of a sample's own loss, r times those of the mean loss.
        right = oracle.condition(len(group) * group, plain.ravel()[group_places].T, OUTPUT_DAMPING)
        result[group_places] = right.T
    return result.reshape(plain.shape)


def one_group(gradient):
    return gradient.reshape(1, -1, gradient.shape[-1])


CASES = {
    "dense-fewer-rows": (lambda: layers.Dense(5), (4, 7), cases.dense, one_group),
    "dense-more-rows": (lambda: layers.Dense(5), (11, 7), cases.dense, one_group),
    "dense-wide-output": (lambda: layers.Dense(19), (11, 7), cases.dense, one_group),
    "dense-sequence": (lambda: layers.Dense(5), (2, 3, 9), cases.dense, one_group),
    "dense-tanh": (lambda: layers.Dense(5, activation="tanh"), (4, 7), cases.dense, one_group),
    "einsum-groups": (
        lambda: layers.EinsumDense("abc,bcd->abd", (3, 4)),
        (6, 3, 5),
        cases.einsum((1,), (0,), (2,), (0,), (1,), (2,)),
        lambda gradient: gradient.transpose(1, 0, 2),
    ),
    "conv1d-causal": (lambda: layers.Conv1D(4, 3, padding="causal"), (3, 7, 2), cases.conv, one_group),
    "conv2d-tanh": (
        lambda: layers.Conv2D(3, 3, strides=2, padding="same", activation="tanh"),
        (2, 6, 5, 2),
        cases.conv,
        one_group,
    ),
    "conv2d-groups": (
        lambda: layers.Conv2D(6, 2, groups=2),
        (2, 5, 5, 4),
        cases.conv,
        lambda gradient: gradient.reshape(-1, 2, 3).transpose(1, 0, 2),
    ),
    "conv2d-channels-first": (
        lambda: layers.Conv2D(2, 2, data_format="channels_first"),
        (2, 3, 5, 4),
        cases.conv,
        lambda gradient: one_group(np.moveaxis(gradient, 1, -1)),
    ),
    "depthwise2d": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (2, 6, 5, 3),
        cases.depthwise,
        lambda gradient: gradient.reshape(-1, 3, 2).transpose(1, 0, 2),
    ),
}


# Of each kind of layer one.
OFTEN = ("compiled-dense-fewer-rows", "compiled-einsum-groups", "compiled-conv2d-groups", "compiled-depthwise2d")


@pytest.mark.parametrize("case", CASES)
@each_mode
@pytest.mark.often(*OFTEN)
def test_conditions_both_sides(case, compiled):
    layer, shape, read, rows_of = CASES[case]
    layer = layer()
    layer.build(shape)
    random = np.random.default_rng(0)
    inputs = random.normal(size=shape).astype("float32")
    cotangent = random.normal(size=layer.compute_output_shape(shape)).astype("float32")
    plain = run(layer, inputs, cotangent, compiled=compiled)
    gradient = cotangent * (1 - plain.outputs**2) if layer.activation is keras.activations.tanh else cotangent
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING)
    conditioned = run(capture_inputs(layer), inputs, cotangent, optimizer, compiled)
    rows, matrix_of = read(layer, inputs)["kernel"]
    formula = expected(rows, matrix_of, plain.gradients[0], rows_of(gradient.astype("float64")))
    assert relative_error(conditioned.gradients[0], formula) < 2e-5
    assert relative_error(conditioned.outputs, plain.outputs) < 1e-6
    assert relative_error(conditioned.input_gradient, plain.input_gradient) < 1e-6
    one_sided = run(layer, inputs, cotangent, paper_isaac(damping=DAMPING), compiled).gradients[0]
    assert relative_error(conditioned.gradients[0], one_sided) > 0.02


@pytest.mark.often("compiled")
@each_mode
def test_both_kernels_of_a_separable_convolution(compiled):
    layer, shape = layers.SeparableConv2D(4, 2, depth_multiplier=2), (2, 4, 4, 2)
    layer.build(shape)
    random = np.random.default_rng(0)
    inputs = random.normal(size=shape).astype("float32")
    cotangent = random.normal(size=layer.compute_output_shape(shape)).astype("float32")
    plain = run(layer, inputs, cotangent, compiled=compiled).gradients
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING)
    conditioned = run(capture_inputs(layer), inputs, cotangent, optimizer, compiled).gradients
    pointwise = np.asarray(keras.ops.convert_to_numpy(layer.pointwise_kernel), "float64")[0, 0]
    between = (cotangent.reshape(-1, 4) @ pointwise.T).reshape(-1, 2, 2).transpose(1, 0, 2)
    readings = cases.separable(layer, inputs)
    for name, outputs, actual, theirs in zip(
        readings, (between, cotangent.reshape(1, -1, 4)), conditioned, plain, strict=False
    ):
        assert relative_error(actual, expected(*readings[name], theirs, outputs.astype("float64"))) < 2e-5


@pytest.mark.often("5-compiled")
@each_mode
@pytest.mark.parametrize("max_rows", [5, 11])
def test_few_rows_stand_for_both_sides(max_rows, compiled):
    layer = layers.Dense(6)
    random = np.random.default_rng(0)
    inputs, cotangent = (random.normal(size=(4, 10, size)).astype("float32") for size in (8, 6))
    plain = run(layer, inputs, cotangent, compiled=compiled).gradients[0]
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING, max_rows=max_rows)
    actual = run(capture_inputs(layer), inputs, cotangent, optimizer, compiled).gradients[0]
    golden = (np.sqrt(5) - 1) / 2
    kept = [int((i + (i * golden) % 1) * 40 / max_rows) for i in range(max_rows)]
    left = oracle.condition(inputs.reshape(40, 8)[kept], plain, DAMPING)
    assert relative_error(actual, oracle.condition(40 * cotangent.reshape(40, 6)[kept], left.T, OUTPUT_DAMPING).T) < 2e-5


@each_mode
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_masks_and_reduce(weight_sharing, compiled):
    table, layer = layers.Embedding(9, 8, mask_zero=True, trainable=False), layers.Dense(3)
    tokens = keras.Input((6,), dtype="int32")
    model = keras.Model(tokens, layer(table(tokens)))
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, size=(4, 6)).astype("int32")
    tokens[0, 3:] = tokens[1, 1:] = 0
    cotangent = random.normal(size=(4, 6, 3)).astype("float32")
    plain = run(model, tokens, cotangent, compiled=compiled).gradients[0]
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING, weight_sharing=weight_sharing)
    actual = run(capture_inputs(model), tokens, cotangent, optimizer, compiled).gradients[0]
    values = np.asarray(keras.ops.convert_to_numpy(table.embeddings), "float64")[tokens]
    counts = tokens != 0
    if weight_sharing == "expand":
        rows, outputs = values[counts], cotangent[counts].astype("float64")
    else:
        rows = np.stack([sample[keep].mean(0) for sample, keep in zip(values, counts, strict=True)])
        outputs = (cotangent.astype("float64") * counts[..., None]).sum(1)
    left = oracle.condition(rows, plain, DAMPING)
    assert relative_error(actual, oracle.condition(len(outputs) * outputs, left.T, OUTPUT_DAMPING).T) < 2e-5


def test_the_scale_of_the_loss_is_divided_out():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 5)).astype("float32"), random.normal(size=(8, 3)).astype("float32")
    kernels = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: keras.optimizers.LossScaleOptimizer(optimizer, 2.0**8)):
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "tanh"), layers.Dense(3)])
        model.set_weights([np.random.default_rng(1).normal(size=weight.shape) for weight in model.weights])
        capture_inputs(model).compile(optimizer=wrap(paper_isaac(damping=0.3, output_damping=0.1)), loss="mse")
        model.fit(x, y, epochs=3, verbose=0)
        kernels.append(np.concatenate([weight.ravel() for weight in model.get_weights()]))
    assert relative_error(*kernels) < 1e-5


def test_is_saved_and_checked():
    assert ISAAC.from_config(paper_isaac(output_damping=0.5).get_config()).output_damping == 0.5
    assert paper_isaac().output_damping is None
    for wrong in (0, -1.0, np.inf, True, "big"):
        with pytest.raises(ValueError, match="`output_damping` must be a finite number above 0 or `None`"):
            paper_isaac(output_damping=wrong)
