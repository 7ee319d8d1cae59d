"""Products in full precision, whatever the backend's default for products is."""

import numpy as np
import oracle
import pytest
from harness import BACKEND, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from oracle import relative_error

from keras_isaac.backend.precision import parts_of, product_of_parts
from keras_isaac.curvature.conditioner import condition, sample_side


def truncate(array, mask):
    return (array.view("int32") & np.int32(mask)).view("float32")


def rounded(array):
    """What a TPU multiplies: bfloat16, the nearest."""
    bits = array.astype("float32").view("uint32").astype("uint64")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("uint32").view("float32")


def rounding_matmul(a, b):
    return np.matmul(rounded(a), rounded(b))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(-15, 15))
def test_parts_are_exact_and_their_product_needs_no_more_than_bfloat16(seed, exponent):
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=shape).astype("float32") for shape in ((5, 40), (40, 7)))
    a *= np.float32(10**exponent)
    parts = parts_of(a, truncate)
    assert all((rounded(part) == part).all() for part in parts)
    np.testing.assert_array_equal(parts[0] + parts[1] + parts[2], a)
    exact = a.astype("float64") @ b
    assert relative_error(rounding_matmul(a, b), exact) > 1e-4
    product = product_of_parts(parts, parts_of(b, truncate), rounding_matmul, np.concatenate)
    assert relative_error(product, exact) < 1e-6


@pytest.mark.parametrize("shape", [(60, 400, 100), (300, 60, 20)], ids=["sample side", "feature side"])
@pytest.mark.skipif(BACKEND == "jax", reason="`test_lowering.py` reads the precision of each of its products")
def test_a_rounding_default_does_not_reach_the_conditioner(shape, monkeypatch):
    """Under products of rounded operands the plain ones lose digits, and the inverse would turn indefinite."""
    from keras_isaac.backend import _backend

    random = np.random.default_rng(0)
    # Activations of a layer, of a positive mean and a decaying spectrum.
    hidden = random.normal(size=(shape[0], 64)) * np.arange(1, 65) ** -0.7
    rows = np.maximum(hidden @ random.normal(size=(64, shape[1])) + 0.1 * random.normal(size=shape[:2]), 0)
    gradient = random.normal(size=(shape[0], shape[2]))
    damping = 0.01 * np.sum(rows**2) / len(rows) / min(shape[:2])
    expected = oracle.conditioned_gradient(rows.astype("float32"), gradient.astype("float32"), np.float32(damping))
    module = _backend.torch if BACKEND == "torch" else _backend.tf
    plain_matmul, calls = module.matmul, []

    def matmul(a, b, **options):
        calls.append(a.shape)
        return plain_matmul(_rounded(module, a), _rounded(module, b), **options)

    if BACKEND == "torch":
        monkeypatch.setattr(module, "get_float32_matmul_precision", lambda: "high")
    else:
        monkeypatch.setattr(_backend, "_rounds_products", lambda: True)
    monkeypatch.setattr(module, "matmul", matmul)
    rows, gradient, damping = (ops.convert_to_tensor(np.asarray(x, "float32")) for x in (rows, gradient, damping))
    if shape[0] <= shape[1]:
        actual = sample_side(rows, gradient, damping)
    else:
        actual = condition(ops.transpose(rows) @ gradient, rows, damping)
    assert calls
    assert relative_error(to_numpy(actual), expected) < 2e-5


def _rounded(module, tensor):
    values = rounded(to_numpy(tensor).astype("float32"))
    return module.from_numpy(values) if BACKEND == "torch" else module.convert_to_tensor(values)
