import keras
import numpy as np
import pytest
from harness import BACKEND, jit, paper_isaac, to_numpy
from keras import ops
from models import captured
from oracle import relative_error

from keras_isaac import ISAAC, backend


def _positive_definite(*shape, seed=0):
    factor = np.random.default_rng(seed).normal(size=(*shape, 2 * shape[-1]))
    return (factor @ np.swapaxes(factor, -2, -1) / shape[-1]).astype("float32")


@pytest.fixture(params=["as it is", "of a GPU"] if BACKEND == "torch" else ["as it is"])
def path(request, monkeypatch):
    """On PyTorch the path of a GPU too, which reads no values."""
    if request.param == "of a GPU":
        from keras_isaac.backend import torch

        monkeypatch.setattr(torch, "_HOST", None)


def damped(matrix, damping):
    """λI + M, tr(M) and λ; on PyTorch the last two are numbers where it reads the matrix."""
    total = ops.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    if isinstance(backend.damped_gram(matrix, damping, 1, False)[1], float):
        total, damping = float(total), float(damping)
    return matrix + damping * ops.eye(matrix.shape[-1]), total, damping


def damped_projection(matrix, damping, factor):
    return backend.damped_projection(*damped(matrix, damping), factor)[0]


def damped_inverse(matrix, damping):
    """λ (λI + M)⁻¹."""
    return damped_projection(matrix, damping, ops.broadcast_to(ops.eye(matrix.shape[-1]), matrix.shape))


def damped_inverse_root(matrix, damping, rows):
    return backend.damped_inverse_root(*damped(matrix, damping), rows)[0]


def both_ways(function, *arrays):
    """The results outside and inside of a compiled function."""
    tensors = [ops.convert_to_tensor(np.asarray(array, "float32")) for array in arrays]
    return [to_numpy(way(*tensors)) for way in (function, jit(function))]


@pytest.mark.usefixtures("path")
@pytest.mark.often("*(2,)*", "*(64,)*", "*(65,)*", "*(3, 5)*")
@pytest.mark.parametrize("shape", [(1,), (2,), (31,), (32,), (64,), (65,), (100,), (3, 5), (2, 70)], ids=str)
def test_is_the_inverse(shape):
    matrix = _positive_definite(*shape)
    for actual in both_ways(damped_inverse, matrix, 0.3):
        assert relative_error(actual, 0.3 * np.linalg.inv(matrix + 0.3 * np.eye(shape[-1]))) < 5e-6
    rows = np.random.default_rng(1).normal(size=(*shape, 3))
    expected = 0.3 * np.linalg.solve(matrix + 0.3 * np.eye(shape[-1]), rows)
    for actual in both_ways(damped_projection, matrix, 0.3, rows):
        assert relative_error(actual, expected) < 5e-6
    expected = np.linalg.solve(np.linalg.cholesky(matrix + 0.3 * np.eye(shape[-1])), rows)
    for actual in both_ways(damped_inverse_root, matrix, 0.3, rows):
        assert relative_error(actual, expected) < 5e-6


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [99, 256, 257])
def test_is_accurate_at_a_hundredth_of_the_mean_eigenvalue_for_half_as_many_features(size):
    """Beyond 256 rows, JAX eliminates in blocks."""
    rows = np.random.default_rng(0).normal(size=(size, size // 2)).astype("float32")
    matrix = rows @ rows.T / (size // 2)
    expected = 0.01 * np.linalg.inv(matrix + 0.01 * np.eye(size))
    for actual in both_ways(damped_inverse, matrix, 0.01):
        assert relative_error(actual, expected) < 3e-4


@pytest.fixture
def optimized():
    """On JAX, compiles as users do, also where the other tests do not."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("path", "optimized")
def test_rows_that_are_nearly_equal_leave_no_noise_in_any_of_many_draws():
    """At the smallest damping that the dtype resolves. A scale that rounds gives one draw in a hundred a wrong gradient."""
    draws = np.random.default_rng(0).normal(size=(2000, 3, 9))
    rows = (draws[:, :1] * (1 + 1e-6 * draws)).astype("float32")
    factor = np.random.default_rng(1).normal(size=(2000, 3, 4))
    damping = 4e-8 * np.sum(np.square(rows), axis=(-2, -1), keepdims=True)
    plain = np.swapaxes(rows, -2, -1) @ factor
    for actual in both_ways(projection_of, rows, damping, factor):
        noise = np.linalg.norm(np.swapaxes(rows, -2, -1) @ actual, axis=(-2, -1)) / np.linalg.norm(plain, axis=(-2, -1))
        assert np.max(noise) < 5e-3


@pytest.mark.usefixtures("path")
@pytest.mark.often("*-3", "*-3-*")
@pytest.mark.parametrize("size", [3, 70])
@pytest.mark.parametrize("bad", ["negative", "indefinite", "nan"])
def test_indefinite_is_bounded_and_nan_stays_so_and_nothing_raises(size, bad):
    matrix = np.eye(size, dtype="float32")
    matrix[-1, -1] = {"negative": -1, "indefinite": 1, "nan": np.nan}[bad]
    if bad == "indefinite":
        matrix[0, -1] = matrix[-1, 0] = 2
    factor = np.random.default_rng(1).normal(size=(size, 2))
    for actual in both_ways(damped_projection, matrix, 1e-20, factor):
        if bad == "nan":
            assert not np.isfinite(actual).all()
        else:
            np.testing.assert_allclose(actual, 1e-20 * factor / np.trace(matrix), rtol=1e-5)
    for actual in both_ways(damped_inverse_root, matrix, 1e-20, np.eye(size)):
        if bad == "nan":
            np.testing.assert_array_equal(actual, 0)
        else:
            np.testing.assert_allclose(actual, np.eye(size) / np.sqrt(np.trace(matrix)), rtol=1e-5)


def projection_of(rows, damping, factor):
    return backend.damped_projection(*backend.damped_gram(rows, damping, 1, False), factor)[0]


def root_of(rows, damping, factor):
    return backend.damped_inverse_root(*backend.damped_gram(rows, damping, 1, False, is_root=True), factor)[0]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [3, 70])
def test_a_damping_that_the_dtype_does_not_resolve_is_raised(size):
    """To the mean eigenvalue's epsilon in the inverse, to four epsilons of the trace in the root."""
    rows = np.diag([*np.ones(size - 1), 0])
    for actual in both_ways(projection_of, rows, 1e-20, np.eye(size)):
        expected = 1e-20 * np.linalg.inv(rows + 2.0**-23 * (size - 1) / size * np.eye(size))
        assert relative_error(actual, expected) < 1e-5
    for actual in both_ways(root_of, rows, 1e-20, np.eye(size)):
        assert relative_error(actual.T @ actual, np.linalg.inv(rows + 2.0**-21 * (size - 1) * np.eye(size))) < 1e-5


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [3, 70])
@pytest.mark.parametrize("damping", [0.0, 1e-20, 1.0])
def test_of_rows_that_overflow_is_zero(size, damping):
    rows = np.diag([*np.ones(size - 1), 1e30])
    for function in (projection_of, root_of):
        for actual in both_ways(function, rows, damping, np.ones((size, 2))):
            np.testing.assert_array_equal(actual, 0)


@pytest.mark.usefixtures("path")
def test_one_bad_matrix_leaves_the_others_of_its_batch_alone():
    matrices = np.stack([np.eye(3), np.diag([2.0, -1.0, 2.0]), 2 * np.eye(3)])
    for actual in both_ways(damped_inverse, matrices, 1e-10):
        np.testing.assert_allclose(actual, [1e-10 * np.eye(3), 1e-10 * np.eye(3) / 3, 1e-10 * np.eye(3) / 2], rtol=1e-6)


@pytest.mark.usefixtures("path")
def test_a_pivot_of_zero_raises_nothing():
    for actual in both_ways(damped_inverse, np.diag([1.0, 1.0, -0.5]), 0.5):
        np.testing.assert_allclose(actual, 0.5 * np.eye(3) / 2, rtol=1e-6)


def test_of_nothing_is_nothing():
    for actual in both_ways(damped_projection, np.zeros((2, 0, 0)), 1.0, np.zeros((2, 0, 3))):
        assert actual.shape == (2, 0, 3)
    for actual in both_ways(damped_inverse_root, np.zeros((2, 0, 0)), 1.0, np.zeros((2, 0, 3))):
        assert actual.shape == (2, 0, 3)


@pytest.mark.skipif(BACKEND != "torch", reason="a compiler finds what is the same")
def test_what_was_inverted_last_is_not_inverted_again(monkeypatch):
    import torch

    factored, cholesky_ex = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factored.append(matrix) or cholesky_ex(matrix))
    # On a GPU no values are compared.
    with keras.device("cpu"):
        matrix = _positive_definite(128)
        for damping, num_factored in ((0.1, 1), (0.1, 1), (0.2, 2), (0.1, 3)):
            actual = to_numpy(damped_inverse(ops.convert_to_tensor(matrix), ops.convert_to_tensor(damping)))
            assert relative_error(actual, damping * np.linalg.inv(matrix + damping * np.eye(128))) < 5e-6
            assert len(factored) == num_factored
        factored.clear()
        inputs = keras.Input((40, 128))
        model = captured(
            paper_isaac(max_rows=1024), keras.Model(inputs, keras.layers.MultiHeadAttention(2, 64)(inputs, inputs))
        )
        model.train_on_batch(*np.random.default_rng(0).normal(size=(2, 4, 40, 128)).astype("float32"))
    # One for query, key and value, and one for the output.
    assert len(factored) == 2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its optimized graph")
def test_layers_that_share_their_input_share_its_inverse_in_a_graph():
    """TensorFlow computes the same thing once, if it is the same down to the read of the damping."""
    from tensorflow.python.eager import context

    inputs = keras.Input((5, 8))
    model = captured(ISAAC(), keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)))
    context.enable_graph_collection()
    model.train_on_batch(*np.random.default_rng(0).normal(size=(2, 4, 5, 8)).astype("float32"))
    metadata = context.export_run_metadata()
    context.disable_graph_collection()
    graphs = [function.post_optimization_graph for function in metadata.function_graphs]
    # One for query, key and value, and one for the output.
    assert max(sum(node.op == "Cholesky" for node in graph.node) for graph in graphs) == 2
