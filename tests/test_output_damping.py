"""The two-parameter method: `output_damping` in each layer that is a product, against its float64 formula."""

import keras
import numpy as np
import oracle
import pytest
from cases import PRODUCTS, data, each_case, expected_gradient
from harness import each_mode, normal, paper_isaac, run
from keras import layers
from models import assert_close, trained
from oracle import relative_error
from test_rows import sums

from keras_isaac import capture_inputs

DAMPING, OUTPUT_DAMPING = 0.3, 40.0


def expected(rows, matrix_of, plain, output_gradients):
    """ζ = λ (λI + XᵀX/r)⁻¹ ∇ μ (μI + rGᵀG)⁻¹ for each group of the rows X and the output's gradients G."""
    plain = expected_gradient(rows, matrix_of, plain, DAMPING)
    places = matrix_of(np.arange(plain.size).reshape(plain.shape))
    result = np.zeros(plain.size)
    for group, group_places in zip(output_gradients, places, strict=True):
        # The empirical Fisher matrix has the gradients of a sample's own loss, r times those of the mean loss.
        right = oracle.condition(len(group) * group, plain.ravel()[group_places].T, OUTPUT_DAMPING)
        result[group_places] = right.T
    return result.reshape(plain.shape)


CASES = ("dense-fewer-rows", "dense-more-rows", "dense-wide-output-no-bias", "dense-sequence", "dense-tanh", "einsum-groups")


@each_case([case for case in PRODUCTS if case.id in CASES])
@each_mode
@pytest.mark.often("compiled-dense-fewer-rows", "compiled-einsum-groups")
def test_conditions_both_sides(case, compiled):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent, compiled=compiled)
    gradient = cotangent * (1 - plain.outputs**2) if layer.activation is keras.activations.tanh else cotangent
    # [rows, groups, out] -> [groups, rows, out]
    groups = np.swapaxes(gradient, 0, 1) if case.id == "einsum-groups" else gradient.reshape(1, -1, gradient.shape[-1])
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING)
    conditioned = run(capture_inputs(layer), inputs, cotangent, optimizer, compiled)
    rows, matrix_of = case.read(layer, inputs)[id(layer.kernel)]
    formula = expected(rows, matrix_of, plain.gradients[0], groups.astype("float64"))
    assert relative_error(conditioned.gradients[0], formula) < 2e-5
    assert relative_error(conditioned.outputs, plain.outputs) < 1e-6
    assert relative_error(conditioned.input_gradient, plain.input_gradient) < 1e-6
    one_sided = run(layer, inputs, cotangent, paper_isaac(damping=DAMPING), compiled).gradients[0]
    assert relative_error(conditioned.gradients[0], one_sided) > 0.02


@pytest.mark.often("5-compiled")
@each_mode
@pytest.mark.parametrize("max_rows", [5, 11])
def test_few_rows_condition_both_sides(max_rows, compiled):
    layer = layers.Dense(6)
    inputs, cotangent = normal((4, 10, 8), (4, 10, 6))
    plain = run(layer, inputs, cotangent, compiled=compiled).gradients[0]
    optimizer = paper_isaac(damping=DAMPING, output_damping=OUTPUT_DAMPING, max_rows=max_rows)
    actual = run(capture_inputs(layer), inputs, cotangent, optimizer, compiled).gradients[0]
    left = oracle.condition(sums(inputs.reshape(40, 8), max_rows), plain, DAMPING)
    outputs = sums(40 * cotangent.reshape(40, 6), max_rows)
    assert relative_error(actual, oracle.condition(outputs, left.T, OUTPUT_DAMPING).T) < 2e-5


def masked(layer):
    tokens = keras.Input((6,), dtype="int32")
    return keras.Model(tokens, layer(layers.Embedding(9, 8, mask_zero=True, trainable=False)(tokens)))


@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (lambda: layers.Conv2D(3, 2), (2, 5, 5, 2), {}),
        (lambda: layers.SeparableConv1D(3, 2), (2, 5, 2), {}),
        (lambda: layers.Conv1DTranspose(3, 2), (2, 5, 2), {}),
        (lambda: layers.LSTM(3), (2, 5, 2), {}),
        (lambda: layers.Dense(3), (2, 5, 2), {"weight_sharing": "reduce"}),
        (lambda: masked(layers.Dense(3)), (2, 6), {}),
        (lambda: layers.Embedding(5, 3), (2, 4), {}),
    ],
    ids=["conv", "separable", "transpose", "lstm", "reduce", "mask", "embedding"],
)
def test_error_output_damping_where_no_one_product_has_the_gradient(make, shape, options):
    layer = make()
    layer.build(shape)
    inputs = np.ones(shape, "int32" if len(shape) == 2 else "float32")
    outputs = np.ones(layer.compute_output_shape(shape), "float32")
    with pytest.raises(ValueError, match=r"Leave the layer of '.*' out by `capture_inputs\(model, exclude=...\)`"):
        run(capture_inputs(layer), inputs, outputs, paper_isaac(output_damping=1.0, **options))


@pytest.mark.parametrize("relative_damping", [False, True])
def test_the_scale_of_the_loss_is_divided_out(relative_damping):
    options = {"damping": 0.3, "output_damping": 0.1, "relative_damping": relative_damping}
    data = normal((8, 6), (8, 3))
    plain, scaled = (
        trained(wrap(paper_isaac(**options)), capture_inputs, data, epochs=3)
        for wrap in (lambda optimizer: optimizer, lambda optimizer: keras.optimizers.LossScaleOptimizer(optimizer, 2.0**8))
    )
    assert_close(scaled, plain, 1e-5)


def test_error_output_damping_that_is_no_positive_number():
    for wrong in (0, -1.0, np.inf, True, "big"):
        with pytest.raises(ValueError, match="`output_damping` must be a finite number above 0 or `None`"):
            paper_isaac(output_damping=wrong)
