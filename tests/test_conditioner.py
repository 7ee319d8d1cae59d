"""The conditioner against the float64 oracle, and what the paper proves of it."""

import keras
import numpy as np
import oracle
import pytest
from cases import relative_unit
from harness import BACKEND, IS_COMPILED, conditioned_gradient, each_mode, normal, paper_isaac, to_numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops
from oracle import relative_error

from keras_isaac import capture_inputs
from keras_isaac.curvature.conditioner import condition

EPSILON = 2.0**-23


def conditioned(rows, output_gradient, damping, compiled=IS_COMPILED):
    return conditioned_gradient(rows, output_gradient, damping, compiled=compiled)


def eigenvalues(rows):
    """Of the smaller of XᵀX/r and XXᵀ/r."""
    return np.linalg.svd(rows.astype("float64") / np.sqrt(len(rows)), compute_uv=False) ** 2


def condition_number(rows, damping):
    """The condition number of the matrix to invert, by which no algorithm's rounding errors can be less amplified."""
    return (eigenvalues(rows).max() + damping) / (eigenvalues(rows).min() + damping)


@st.composite
def problems(draw):
    num_rows, num_features, num_outputs = (draw(st.integers(1, 9)) for _ in range(3))
    rows, gradient = normal((num_rows, num_features), (num_rows, num_outputs), seed=draw(st.integers(0, 10**6)))
    return rows, gradient, 10.0 ** draw(st.floats(-8, 8))


@settings(deadline=None, max_examples=60)
@given(problems())
@example((*normal((4, 1), (4, 1), seed=2004), 1.0))  # The gradient's terms cancel to five digits.
def test_is_the_oracles_to_the_conditioning_of_the_problem(problem):
    rows, gradient, damping = problem
    # The float32 floor of the damping is part of what is promised.
    resolved = max(damping, EPSILON * eigenvalues(rows).mean())
    expected = oracle.conditioned_gradient(rows, gradient, resolved) * (damping / resolved)
    # Where the terms of the plain gradient cancel, it has lost as many digits itself.
    cancellation = np.linalg.norm(abs(rows).T @ abs(gradient)) / np.linalg.norm(rows.T.astype("float64") @ gradient)
    bound = 30 * EPSILON * condition_number(rows, resolved) * cancellation
    assert relative_error(conditioned(rows, gradient, damping), expected) < bound


@settings(deadline=None, max_examples=60)
@given(problems())
def test_theorem_direction_of_increase_for_any_damping(problem):
    rows, gradient, damping = problem
    plain = rows.T.astype("float64") @ gradient
    assert np.sum(conditioned(rows, gradient, damping) * plain) > 0


@pytest.mark.parametrize(("rows", "features", "outputs"), [(60, 400, 300), (60, 400, 500), (400, 60, 100), (1, 8, 8)])
@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e8])
@each_mode
def test_float32_is_accurate_over_sixteen_decades_of_damping(rows, features, outputs, damping, compiled):
    inputs, gradient = normal((rows, features), (rows, outputs))
    expected = oracle.conditioned_gradient(inputs, gradient, np.float32(damping))
    assert relative_error(conditioned(inputs, gradient, damping, compiled), expected) < 1e-5


@pytest.mark.parametrize("kind", ["equal", "nearly equal", "of many scales"])
@pytest.mark.parametrize(("rows", "features"), [(3, 9), (50, 60), (200, 260)])
@pytest.mark.parametrize("damping", [1e-12, 1e-7, 1e-5])
def test_dependent_rows_leave_no_noise_under_a_small_damping(kind, rows, features, damping):
    inputs, output_gradient = normal((rows, features), (rows, 4))
    if kind == "of many scales":
        inputs *= 10 ** np.linspace(-3, 3, features, dtype="float32")
    else:
        inputs = inputs[:1] * (1 + (1e-6 if kind == "nearly equal" else 0) * inputs)
    damping = np.float32(damping * np.sum(inputs**2) / rows)
    plain = inputs.T.astype("float64") @ output_gradient
    expected = oracle.conditioned_gradient(inputs, output_gradient, damping)
    tensors = [ops.convert_to_tensor(np.asarray(x, "float32")) for x in (plain, inputs, damping)]
    for actual in (conditioned(inputs, output_gradient, damping), to_numpy(condition(*tensors))):
        assert np.linalg.norm(actual - expected) < 5e-3 * np.linalg.norm(plain)


def test_theorem_infinite_damping_is_the_gradient_and_vanishing_damping_the_pseudo_inverse():
    for shape in ((5, 9), (9, 5)):
        rows, gradient = normal(shape, (shape[0], 3))
        plain = rows.T.astype("float64") @ gradient
        assert relative_error(conditioned(rows, gradient, 1e30), plain) < 1e-6
        newton = np.linalg.pinv(rows.T.astype("float64") @ rows / len(rows), rcond=1e-10) @ plain
        assert relative_error(conditioned(rows, gradient, 1e-7) / 1e-7, newton) < 1e-4


def test_theorem_isaac_is_kfac_as_the_output_damping_grows():
    rows, per_sample = normal((12, 7), (12, 4))
    mean_loss_gradient = per_sample / len(rows)
    kfac = oracle.kfac_gradient(rows, per_sample, 0.3, output_damping=1e9)
    assert relative_error(conditioned(rows, mean_loss_gradient, 0.3), kfac) < 1e-5


@pytest.mark.parametrize("shape", [(6, 9), (12, 7), (5, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("outputs", [3, 30])
@pytest.mark.parametrize("output_damping", [1e-3, 0.3, 1e9])
@pytest.mark.parametrize(
    "options", [{}, {"relative_damping": True}, {"relative_damping": True, "preserve_norm": True}], ids=str
)
def test_two_parameter_method_is_the_papers_with_the_empirical_fisher(shape, outputs, output_damping, options):
    rows, per_sample = normal(shape, (shape[0], outputs))
    plain = rows.T.astype("float64") @ per_sample / shape[0]
    actual = conditioned_gradient(rows, per_sample / np.float32(shape[0]), 0.3, output_damping, **options)
    units = (relative_unit(rows), relative_unit(per_sample)) if options else (1, 1)
    expected = oracle.kfac_gradient(rows, per_sample, 0.3 * units[0], output_damping * units[1])
    # The outputs' side conditions the finished gradient: what float32 lost of the longer one is part of the shorter.
    shortening = np.linalg.norm(plain) / np.linalg.norm(expected)
    if "preserve_norm" in options:
        expected *= shortening
    assert relative_error(actual, expected) < 1e-5 + 2.0**-18 * shortening
    assert np.sum(actual * plain) > 0


def test_theorem_both_dampings_vanishing_give_kfacs_step():
    rows, per_sample = normal((12, 7), (12, 4))
    covariance, fisher = (x.T.astype("float64") @ x / len(x) for x in (rows, per_sample))
    step = np.linalg.inv(covariance) @ (rows.T.astype("float64") @ per_sample / len(rows)) @ np.linalg.inv(fisher)
    assert relative_error(conditioned_gradient(rows, per_sample / 12, 1e-6, 1e-6) / 1e-12, step) < 1e-4


@pytest.mark.parametrize("hidden", [False, True], ids=["linear regression", "last layer"])
def test_theorem_gauss_newton_for_the_last_layer_under_squared_error(hidden):
    inputs, targets = normal((40, 6), (40, 3))
    head = keras.layers.Dense(3, use_bias=False)
    body = [keras.layers.Dense(4, activation="tanh", trainable=False)] if hidden else []
    model = keras.Sequential([keras.Input((6,)), *body, head])
    features = keras.ops.convert_to_numpy(model.layers[0](inputs)) if hidden else inputs
    damping = 1e-4
    # For the mean over 3 outputs the Gauss-Newton matrix is 2/3 XᵀX/r; a full step with ζ* = λ(...)⁻¹∇ is 3/2 / λ long.
    capture_inputs(model).compile(optimizer=paper_isaac(learning_rate=1.5 / damping, damping=damping), loss="mse")
    model.train_on_batch(inputs, targets)
    solution = np.linalg.lstsq(features.astype("float64"), targets.astype("float64"), rcond=None)[0]
    assert relative_error(to_numpy(head.kernel), solution) < 1e-2


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["sample side", "feature side"])
@pytest.mark.parametrize("kind", ["duplicate rows", "a zero row", "constant", "zero feature", "rank one"])
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 1.0])
def test_degenerate_rows(shape, kind, damping):
    rows, gradient = normal(shape, (shape[0], 4))
    if kind == "duplicate rows":
        rows[1::2] = rows[::2][: len(rows[1::2])]
    elif kind == "a zero row":
        rows[0] = 0
    elif kind == "zero feature":
        rows[:, 0] = 0
    else:
        rows[:] = 1.0 if kind == "constant" else rows[:1]
    actual = conditioned(rows, gradient, damping)
    assert np.isfinite(actual).all()
    if damping > 1e-6:
        expected = oracle.conditioned_gradient(rows, gradient, damping)
        assert relative_error(actual, expected) < 30 * EPSILON * condition_number(rows, damping)


def test_all_rows_zero_have_the_zero_gradient():
    rows, gradient = normal((6, 9), (6, 4))
    np.testing.assert_array_equal(conditioned(0 * rows, gradient, 1.0), 0)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)], ids=["sample side", "feature side"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_no_scale_of_the_inputs_overflows(shape, scale):
    rows, gradient = normal(shape, (shape[0], 4))
    damping = np.float32(1e-30 if scale == 1e-15 else 0.5 * min(scale**2, 1e30))
    actual = conditioned(rows * np.float32(scale), gradient, damping)
    expected = oracle.conditioned_gradient(rows.astype("float64") * scale, gradient, damping)
    assert np.isfinite(actual).all()
    if scale != 1e-30:  # There a damping of the inputs' scale is below the smallest float32.
        assert relative_error(actual, expected) < (1e-5 if scale != 1e30 else np.inf)


def test_where_few_rows_and_a_finished_gradient_overflow_it_stays_as_it_is():
    rows, gradient = (x * np.float32(1e30) for x in normal((6, 9), (9, 4)))

    def after(gradient):
        return to_numpy(condition(*(ops.convert_to_tensor(x) for x in (gradient, rows, np.float32(0.5)))))

    np.testing.assert_array_equal(after(gradient), gradient)
    gradient[2, 1] = np.nan
    assert np.isnan(after(gradient)[2, 1])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["sample side", "feature side"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["rows", "gradient"])
@each_mode
def test_non_finite_in_non_finite_out_and_no_exception(shape, bad, where, compiled):
    rows, gradient = normal(shape, (shape[0], 4))
    {"rows": rows, "gradient": gradient}[where][2, 1] = bad
    assert not np.isfinite(conditioned(rows, gradient, 0.5, compiled)).all()


def test_both_sides_are_one_matrix():
    rows, gradient = normal((8, 8), (8, 5))
    tensors = (ops.convert_to_tensor(np.asarray(x, "float32")) for x in (rows.T @ gradient, rows, 0.5))
    feature = to_numpy(condition(*tensors))
    assert relative_error(conditioned(rows, gradient, 0.5), feature) < 1e-5


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has float64 only where the process enables it")
def test_float64_rows_are_conditioned_in_float64():
    rows, gradient = (x.astype("float64") for x in normal((6, 9), (6, 4)))
    # The dampings of a step are float32.
    damping = float(np.float32(1e-6))
    result = conditioned_gradient(rows, gradient, damping, dtype="float64")
    assert relative_error(result, oracle.conditioned_gradient(rows, gradient, damping)) < 1e-12
    result = conditioned_gradient(rows, gradient, 0.5, 0.5, dtype="float64")
    assert relative_error(result, oracle.kfac_gradient(rows, 6 * gradient, 0.5, 0.5)) < 1e-12


@pytest.mark.skipif(BACKEND != "torch", reason="the authors' package is PyTorch's")
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)], ids=["b < n", "b > n", "b = n"])
def test_agrees_with_the_authors_package(shape):
    import torch

    isaac = pytest.importorskip("isaac")
    rows, gradient = (torch.tensor(x) for x in normal(shape, (shape[0], 4)))
    theirs = isaac.Linear(shape[1], 4, la=0.5, inv_type="inverse")
    theirs(rows).backward(gradient)
    ours = conditioned(rows, gradient, 0.5)
    assert relative_error(ours, theirs.weight.grad.numpy().T) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="the authors' package is PyTorch's")
def test_keeps_the_digits_that_the_authors_package_loses():
    import torch

    isaac = pytest.importorskip("isaac")
    rows, gradient = normal((60, 400), (60, 300))
    theirs = isaac.Linear(400, 300, la=1e-6, inv_type="inverse")
    theirs(torch.tensor(rows)).backward(torch.tensor(gradient))
    expected = oracle.conditioned_gradient(rows, gradient, 1e-6)
    assert relative_error(theirs.weight.grad.numpy().T, expected) > 0.1
    assert relative_error(conditioned(rows, gradient, 1e-6), expected) < 1e-5
