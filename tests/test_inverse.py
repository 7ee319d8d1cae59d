import numpy as np
import pytest
from harness import jit, to_numpy
from keras import ops
from oracle import relative_error

from keras_isaac.inverse import gauss_jordan, positive_definite_inverse


def _positive_definite(*shape, seed=0):
    factor = np.random.default_rng(seed).normal(size=(*shape, 2 * shape[-1]))
    return (factor @ np.swapaxes(factor, -2, -1) / shape[-1]).astype("float32")


@pytest.mark.parametrize("inverse", [positive_definite_inverse, gauss_jordan])
@pytest.mark.parametrize("shape", [(1,), (2,), (31,), (32,), (33,), (70,), (3, 5), (2, 40)], ids=str)
def test_is_the_inverse(inverse, shape):
    matrix = _positive_definite(*shape)
    expected = np.linalg.inv(matrix.astype("float64"))
    assert relative_error(to_numpy(inverse(ops.convert_to_tensor(matrix))), expected) < 5e-6
    assert relative_error(to_numpy(jit(inverse)(ops.convert_to_tensor(matrix))), expected) < 5e-6


@pytest.mark.parametrize("inverse", [positive_definite_inverse, gauss_jordan])
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("bad", ["negative", "indefinite", "singular", "nan", "infinite"])
def test_is_nan_and_raises_nothing_where_there_is_none(inverse, size, bad):
    matrix = np.eye(size, dtype="float32")
    matrix[-1, -1] = {"negative": -1, "indefinite": 1, "singular": 0, "nan": np.nan, "infinite": 1}[bad]
    if bad == "indefinite":
        matrix[0, -1] = matrix[-1, 0] = 2
    if bad == "infinite":
        matrix[0, 1] = matrix[1, 0] = np.inf
    assert np.isnan(to_numpy(inverse(ops.convert_to_tensor(matrix)))).any()
    assert np.isnan(to_numpy(jit(inverse)(ops.convert_to_tensor(matrix)))).any()


def test_one_bad_matrix_leaves_the_others_of_its_batch_alone():
    matrices = np.stack([np.eye(3), -np.eye(3), 2 * np.eye(3)]).astype("float32")
    inverses = to_numpy(positive_definite_inverse(ops.convert_to_tensor(matrices)))
    np.testing.assert_allclose(inverses[[0, 2]], [np.eye(3), np.eye(3) / 2])
    assert np.isnan(inverses[1]).any()
