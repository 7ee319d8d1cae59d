"""A damping in units of the mean eigenvalue, and a conditioned gradient of the plain gradient's norm."""

import numpy as np
import pytest
from cases import OFTEN, assert_conditioned, data, each_case
from harness import BACKEND, conditioned_gradient, normal, paper_isaac, run
from keras import layers, ops
from oracle import relative_error

from keras_isaac import capture_inputs
from keras_isaac.curvature.conditioner import with_norm_of

SHAPES = [(5, 9, 3), (5, 9, 30), (9, 5, 3), (5, 5, 5), (1, 4, 2)]


@each_case()
@pytest.mark.often(*OFTEN)
def test_each_layer_has_its_own_damping_and_keeps_its_own_norm(case):
    layer, inputs, cotangent = data(case)
    plain, reading = run(layer, inputs, cotangent), case.read(layer, inputs)
    capture_inputs(layer)
    for options in ({"relative_damping": True}, {"relative_damping": True, "preserve_norm": True}):
        gradients = run(layer, inputs, cotangent, paper_isaac(damping=0.5, **options), True).gradients
        assert_conditioned(layer, reading, plain.gradients, gradients, 0.5, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_relative_damping_makes_the_scale_of_the_inputs_a_factor(shape, scale):
    rows, gradient = normal(shape[:2], shape[::2])

    def conditioned(rows, **options):
        return conditioned_gradient(rows, gradient, 0.3, relative_damping=True, **options)

    for preserve_norm in (False, True):
        unscaled = conditioned(rows, preserve_norm=preserve_norm)
        assert relative_error(conditioned(rows * scale, preserve_norm=preserve_norm), unscaled * np.float32(scale)) < 1e-5
    assert np.linalg.norm(unscaled) == pytest.approx(np.linalg.norm(rows.T @ gradient), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_norm_whose_square_overflows_is_not_preserved_and_nothing_is_lost(shape):
    random = np.random.default_rng(0)
    plain = ops.convert_to_tensor((1e22 * random.normal(size=shape[1:])).astype("float32"))
    conditioned = plain * 1e-6
    np.testing.assert_array_equal(*(ops.convert_to_numpy(x) for x in (with_norm_of(plain, conditioned), conditioned)))
    assert np.isfinite(conditioned_gradient(np.ones(shape[:2]), 1e22 * np.ones(shape[::2]), 1e-6, preserve_norm=True)).all()


@pytest.mark.parametrize("kind", ["equal rows", "nearly equal rows", "features of many scales"])
@pytest.mark.parametrize("shape", [(8, 20, 5), (60, 80, 100)], ids=str)
def test_the_norm_is_kept_where_rows_depend_on_each_other(kind, shape):
    random = np.random.default_rng(2)
    rows, gradient = (random.normal(size=(shape[0], size)) for size in shape[1:])
    if kind == "features of many scales":
        rows *= 10 ** np.linspace(-3, 3, shape[1])
    else:
        rows = rows[:1] * (1 + 1e-6 * (kind == "nearly equal rows") * rows)
    norm = np.linalg.norm(rows.astype("float32").T.astype("float64") @ gradient)
    for damping in 10.0 ** np.arange(-6, 9, 2):
        actual = conditioned_gradient(rows, gradient, damping, relative_damping=True, preserve_norm=True)
        assert np.linalg.norm(actual) == pytest.approx(norm, rel=1e-4), damping


@pytest.mark.parametrize("zeros", ["rows", "gradient", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_vanishes_leaves_a_gradient_that_vanishes(shape, zeros):
    rows, gradient = normal(shape[:2], shape[::2], seed=2)
    rows, gradient = rows * (zeros == "gradient"), gradient * (zeros == "rows")
    assert not conditioned_gradient(rows, gradient, 1.0, relative_damping=True, preserve_norm=True).any()


@pytest.mark.parametrize("flag", ["relative_damping", "preserve_norm", "per_replica"])
def test_flags_take_no_numbers(flag):
    with pytest.raises(ValueError, match=rf"`{flag}` must be `True` or `False`.* Received: {flag}=0.5"):
        paper_isaac(**{flag: 0.5})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has sparse gradients")
def test_sparse_gradients_stay_sparse_but_where_their_norm_is_preserved():
    import tensorflow as tf

    layer = capture_inputs(layers.Embedding(5, 3))
    layer.build((2, 4))
    for preserve_norm in (False, True):
        optimizer = paper_isaac(relative_damping=True, preserve_norm=preserve_norm)
        with tf.GradientTape() as tape, optimizer.conditioning():
            outputs = layer(np.array([[0, 1, 1, 3]]))
        gradient = tape.gradient(outputs, layer.embeddings.value)
        assert isinstance(gradient, tf.IndexedSlices) is not preserve_norm
