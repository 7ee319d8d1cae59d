"""The inverse of a positive definite matrix, never raising, by what is fast on each backend.

`keras.ops.cholesky` raises on PyTorch, on eager JAX and on TensorFlow when the matrix is not positive definite, which would
end a run over one bad batch. Here such a matrix (or a non-finite one) has an inverse of NaN, and the caller decides.
"""

import keras
from keras import ops

# Rows eliminated at a time. Measured on JAX, 2 CPU cores: 32 is best or near it for matrices of 60 to 512 rows.
_BLOCK = 32


def positive_definite_inverse(matrix):
    """Inverts symmetric positive definite matrices.

    Args:
        matrix: tensor of shape `[..., k, k]`, float32 or float64. `k` is static on JAX.

    Returns:
        The inverse, `[..., k, k]`; it holds NaN where the matrix is not numerically positive definite.
    """
    return _inverse(matrix)


def _cholesky_torch(matrix):
    # The `_ex` form neither raises nor waits for the device.
    factor, failed_at = torch.linalg.cholesky_ex(matrix)
    failed = (failed_at > 0)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.where(failed, identity, factor))
    return torch.where(failed, torch.nan, inverse)


def _cholesky_tensorflow(matrix):
    factor = tf.linalg.cholesky(matrix)
    identity = tf.eye(tf.shape(matrix)[-1], batch_shape=tf.shape(matrix)[:-2], dtype=matrix.dtype)
    factor_inverse = tf.linalg.triangular_solve(factor, identity)
    return tf.matmul(factor_inverse, factor_inverse, transpose_a=True)


def gauss_jordan(matrix, block=_BLOCK):
    """Blocked Gauss-Jordan elimination without pivoting, in matrix products and one loop.

    XLA on the CPU has no factorization of its own: it calls a LAPACK whose threads contend with XLA's, and a single small
    Cholesky can double a training step. This form needs none, and its compile time does not grow with the matrix.
    """
    size = matrix.shape[-1]
    if size <= block:
        return _gauss_jordan_unblocked(matrix)
    num_blocks = -(-size // block)
    padding = num_blocks * block - size
    leading = [(0, 0)] * (len(matrix.shape) - 2)
    index = ops.arange(size + padding)
    matrix = ops.pad(matrix, [*leading, (0, padding), (0, padding)])
    matrix = matrix + ops.diag(ops.cast(index >= size, matrix.dtype))
    shape = tuple(matrix.shape)
    origin = (0,) * len(leading)

    def eliminate(i, matrix):
        start = i * block
        in_block = ops.logical_and(index >= start, index < start + block)
        pivot = ops.slice(matrix, (*origin, start, start), (*shape[:-2], block, block))
        rows = ops.slice(matrix, (*origin, start, 0), (*shape[:-2], block, shape[-1]))
        columns = ops.slice(matrix, (*origin, 0, start), (*shape[:-1], block))
        pivot = _gauss_jordan_unblocked(pivot)
        rows = ops.slice_update(ops.matmul(pivot, rows), (*origin, 0, start), pivot)
        columns = ops.where(in_block[:, None], 0.0, columns)
        matrix = ops.where(in_block, 0.0, matrix) - ops.matmul(columns, rows)
        return ops.slice_update(matrix, (*origin, start, 0), rows)

    matrix = ops.fori_loop(0, num_blocks, eliminate, matrix)
    return matrix[..., :size, :size]


def _gauss_jordan_unblocked(matrix):
    shape = tuple(matrix.shape)
    index = ops.arange(shape[-1])
    origin = (0,) * (len(shape) - 2)

    def eliminate(i, matrix):
        at_pivot = index == i
        pivot = ops.slice(matrix, (*origin, i, i), (*shape[:-2], 1, 1))
        row = ops.slice(matrix, (*origin, i, 0), (*shape[:-2], 1, shape[-1]))
        column = ops.slice(matrix, (*origin, 0, i), (*shape[:-1], 1))
        # Every pivot of a positive definite matrix is positive.
        pivot = ops.where(pivot > 0, pivot, float("nan"))
        row = ops.where(at_pivot, 1.0, row) / pivot
        column = ops.where(at_pivot[:, None], 0.0, column)
        return ops.where(at_pivot[:, None], row, ops.where(at_pivot, 0.0, matrix) - column * row)

    return ops.fori_loop(0, shape[-1], eliminate, matrix)


if keras.backend.backend() == "torch":
    import torch

    _inverse = _cholesky_torch
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    _inverse = _cholesky_tensorflow
else:
    import jax

    # Outside a compiled step, the loop would be traced again at each call.
    _inverse = jax.jit(gauss_jordan)
