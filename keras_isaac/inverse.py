"""The inverse of λI + M for a positive semidefinite M, never raising, by what is fast on each backend.

`keras.ops.cholesky` raises on PyTorch, on eager JAX and on TensorFlow when the matrix is not positive definite, which would
end a run over one bad batch. Here rounding may leave a singular matrix indefinite, and the result is still a descent.
"""

import keras
from keras import ops

from keras_isaac.replicas import laid_out

# Rows eliminated at a time. Measured on JAX, 2 CPU cores: 32 is best or near it for matrices of 128 to 512 rows. Up to 64 rows
# one at a time is as fast, and compiles in a third of the time.
_BLOCK, _UNBLOCKED = 32, 64
# Of so many rows, an inverse on PyTorch costs far more than a look whether it is the last one, and is not too large to keep.
_SHARED = range(128, 1025)
_EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
# Stands in for a damping and a matrix that are both zero in float32.
_TINY = 1e-37


def trace(matrix):
    """Returns the sum of the diagonal of a matrix `[..., k, k]`, as `[..., 1, 1]`."""
    # `keras.ops.trace` reads the whole matrix on TensorFlow.
    return _trace(matrix)[..., None, None]


def damping_relative_to(matrix, damping, rank):
    """Returns a damping in units of the mean eigenvalue of M, δ tr(M)/rank, as what broadcasts to `[..., 1, 1]`.

    Above zero, so that rows that are all zero leave the gradient as it is.
    """
    if _is_in_numbers(matrix):
        return min(max(float(damping) * matrix.trace().item() / float(rank), _TINY), 1 / _TINY)
    return ops.clip(damping * trace(matrix) / rank, _TINY, 1 / _TINY)


def damped_inverse(matrix, damping):
    """Returns (λI + M)⁻¹.

    A damping below the mean eigenvalue's epsilon is raised to it. Where M is numerically indefinite all the same, 1/(λ + tr M),
    a bound from below, takes the inverse's place: the step is then the plain gradient's, shortened. Where M overflows, that is
    zero; where M is NaN, so is the result.

    Args:
        matrix: tensor of shape `[..., k, k]` (M), float32 or float64. `k` is static on JAX.
        damping: tensor that broadcasts to `[..., 1, 1]` (λ), or number, not negative.

    Returns:
        Tensor `[..., k, k]`.
    """
    # Of an empty batch there is nothing to invert.
    return matrix if matrix.shape[-1] == 0 else _damped_inverse(matrix, damping)


def damped_inverse_root(matrix, damping, rows):
    """Returns RF with RᵀR = (λI + M)⁻¹, R the inverse of the Cholesky factor.

    What is multiplied by R and then by Rᵀ keeps the digits that it loses in their product, where λI + M is nearly singular.
    As `damped_inverse`, but that a damping below four epsilons of the trace is raised to them, and that the result is zero
    where M is not finite.

    Args:
        matrix: tensor of shape `[..., k, k]` (M), float32 or float64. `k` is static on JAX.
        damping: tensor that broadcasts to `[..., 1, 1]` (λ), or number, not negative.
        rows: tensor `[..., k, n]` (F).

    Returns:
        Tensor `[..., k, n]`.
    """
    return rows if matrix.shape[-1] == 0 else _damped_inverse_root(matrix, damping, rows)


def _damped_inverse_in_graph(matrix, damping):
    damped, bound, identity = _damped(matrix, damping, 1 / ops.cast(ops.shape(matrix)[-1], matrix.dtype))
    inverse = _inverse(damped)
    # Elimination without a positive pivot leaves no entry finite.
    return ops.where(ops.isfinite(inverse[..., -1:, -1:]), inverse, identity / bound)


def _damped(matrix, damping, floor):
    """Returns λI + M for a λ of at least `floor` times the trace's epsilon, what bounds its eigenvalues, and I."""
    dtype = keras.backend.standardize_dtype(matrix.dtype)
    identity = ops.eye(ops.shape(matrix)[-1], dtype=dtype)
    bound = trace(matrix)
    return matrix + ops.maximum(damping, _EPSILON[dtype] * floor * bound + _TINY) * identity, damping + bound, identity


def _damped_inverse_torch(matrix, damping):
    inverse, floor = None, 1 / matrix.shape[-1]
    if _is_in_numbers(matrix):
        inverse = _inverse_if_definite(_damped_in_numbers(matrix, damping, floor))
    return _from_factor_torch(matrix, damping, floor, torch.cholesky_inverse, 1) if inverse is None else inverse


def _damped_inverse_root_torch(matrix, damping, rows):
    def solve(factor):
        # From the factor at once, which spares a product.
        return torch.linalg.solve_triangular(factor, rows, upper=False)

    factor = _factor_if_definite(_damped_in_numbers(matrix, damping, 4)) if _is_in_numbers(matrix) else None
    whitened = _from_factor_torch(matrix, damping, 4, solve, 0.5) if factor is None else solve(factor)
    return whitened.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _is_in_numbers_torch(matrix):
    # Eager PyTorch pays for every operation on tensors. On the CPU nothing waits for a number.
    is_plain = matrix.device.type == "cpu" and matrix.ndim == 2 and matrix.shape[-1] > 0
    return is_plain and not (matrix.requires_grad or torch.compiler.is_compiling())


def _damped_in_numbers(matrix, damping, floor):
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    floor *= torch.finfo(matrix.dtype).eps * matrix.trace().item()
    return torch.add(matrix, identity, alpha=max(float(damping), floor + _TINY))


def _factor_if_definite(matrix):
    factor, failed_at = torch.linalg.cholesky_ex(matrix)
    return factor if failed_at.item() == 0 else None


def _inverse_if_definite(matrix):
    """Returns the inverse, or `None`. Layers that share their input, as query, key and value do, share its inverse."""
    global _last
    last_matrix, last_inverse = _last
    if matrix.shape == last_matrix.shape and matrix.dtype == last_matrix.dtype and torch.equal(matrix, last_matrix):
        return last_inverse
    factor = _factor_if_definite(matrix)
    inverse = None if factor is None else torch.cholesky_inverse(factor)
    if matrix.shape[-1] in _SHARED:
        _last = matrix, inverse
    return inverse


def _from_factor_torch(matrix, damping, floor, inverse_of, power):
    dtype = matrix.dtype
    identity = torch.eye(matrix.shape[-1], dtype=dtype, device=matrix.device)
    damping, bound = torch.as_tensor(damping, dtype=dtype, device=matrix.device), trace(matrix)
    # The `_ex` form neither raises nor waits for the device.
    damped = torch.addcmul(matrix, identity, torch.maximum(damping, bound * floor * torch.finfo(dtype).eps + _TINY))
    factor, failed_at = torch.linalg.cholesky_ex(damped)
    failed = (failed_at > 0)[..., None, None]
    inverse = inverse_of(torch.where(failed, identity, factor))
    return torch.where(failed, inverse / (damping + bound) ** power, inverse)


def _inverse_tensorflow(matrix):
    identity = tf.eye(tf.shape(matrix)[-1], batch_shape=tf.shape(matrix)[:-2], dtype=matrix.dtype)
    root = tf.linalg.triangular_solve(tf.linalg.cholesky(matrix), identity)
    return tf.matmul(root, root, transpose_a=True)


def _damped_inverse_root_tensorflow(matrix, damping, rows):
    damped, bound, identity = _damped(matrix, damping, 4)
    factor = tf.linalg.cholesky(damped)
    # Of a failed factor no entry is finite.
    factor = tf.where(tf.math.is_finite(factor[..., -1:, -1:]), factor, tf.where(identity > 0, tf.sqrt(bound), 0.0))
    # From the factor at once, which spares a product.
    return tf.where(tf.math.is_finite(bound), tf.linalg.triangular_solve(factor, rows), 0.0)


def gauss_jordan(matrix, is_root=False):
    """Blocked Gauss-Jordan elimination without pivoting, in matrix products and one loop; NaN where a pivot is not positive.

    XLA on the CPU has no factorization of its own: it calls a LAPACK whose threads contend with XLA's, and a single small
    Cholesky can double a training step. This form needs none, and its compile time does not grow with the matrix.

    Args:
        matrix: tensor `[..., k, k]`, symmetric.
        is_root: boolean, whether rows are eliminated only from those below them, and scaled by the root of their pivots,
            which gives the inverse of the Cholesky factor. Defaults to `False`: from all, which gives the inverse.
    """
    size = matrix.shape[-1]
    if size <= _UNBLOCKED:
        return _gauss_jordan_unblocked(matrix, is_root)
    num_blocks = -(-size // _BLOCK)
    padding = num_blocks * _BLOCK - size
    leading = [(0, 0)] * (len(matrix.shape) - 2)
    index = ops.arange(size + padding)
    matrix = ops.pad(matrix, [*leading, (0, padding), (0, padding)])
    matrix = matrix + ops.diag(ops.cast(index >= size, matrix.dtype))
    shape = tuple(matrix.shape)
    origin = (0,) * len(leading)

    def eliminate(i, matrix):
        start = i * _BLOCK
        in_block = ops.logical_and(index >= start, index < start + _BLOCK)
        pivot = ops.slice(matrix, (*origin, start, start), (*shape[:-2], _BLOCK, _BLOCK))
        rows = ops.slice(matrix, (*origin, start, 0), (*shape[:-2], _BLOCK, shape[-1]))
        columns = ops.slice(matrix, (*origin, 0, start), (*shape[:-1], _BLOCK))
        pivot = _gauss_jordan_unblocked(pivot, is_root)
        rows = ops.slice_update(ops.matmul(pivot, rows), (*origin, 0, start), pivot)
        if is_root:
            columns = ops.where((index >= start + _BLOCK)[:, None], columns, 0.0)
            columns = ops.matmul(columns, ops.swapaxes(pivot, -2, -1))
        else:
            columns = ops.where(in_block[:, None], 0.0, columns)
        matrix = ops.where(in_block, 0.0, matrix) - ops.matmul(columns, rows)
        return ops.slice_update(matrix, (*origin, start, 0), rows)

    matrix = ops.fori_loop(0, num_blocks, eliminate, matrix)
    return matrix[..., :size, :size]


def _gauss_jordan_unblocked(matrix, is_root):
    shape = tuple(matrix.shape)
    origin = (0,) * (len(shape) - 2)

    def eliminate(i, matrix):
        # In the loop, where it is no operand.
        index = ops.arange(shape[-1])
        at_pivot = index == i
        pivot = ops.slice(matrix, (*origin, i, i), (*shape[:-2], 1, 1))
        row = ops.slice(matrix, (*origin, i, 0), (*shape[:-2], 1, shape[-1]))
        column = ops.slice(matrix, (*origin, 0, i), (*shape[:-1], 1))
        # Every pivot of a positive definite matrix is positive.
        pivot = ops.where(pivot > 0, pivot, float("nan"))
        row = ops.where(at_pivot, 1.0, row)
        if is_root:
            pivot = ops.sqrt(pivot)
            column = ops.where((index > i)[:, None], column, 0.0) / pivot
        else:
            column = ops.where(at_pivot[:, None], 0.0, column)
        row = row / pivot
        matrix = ops.where(at_pivot, 0.0, matrix) - column * row
        return ops.slice_update(matrix, (*origin, i, 0), row)

    # Two to a turn of the loop write into each other's place, where one alone would be copied back.
    matrix = ops.fori_loop(0, shape[-1] // 2, lambda i, matrix: eliminate(2 * i + 1, eliminate(2 * i, matrix)), matrix)
    return eliminate(shape[-1] - 1, matrix) if shape[-1] % 2 else matrix


if keras.backend.backend() == "torch":
    import torch

    _damped_inverse, _damped_inverse_root = _damped_inverse_torch, _damped_inverse_root_torch
    _is_in_numbers = _is_in_numbers_torch

    def _trace(matrix):
        return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)

    _last = torch.empty(0, 0), None
else:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        _trace, _inverse = tf.linalg.trace, _inverse_tensorflow

        def _once_per_shape(function):
            traced = tf.function(function, autograph=False)
            return lambda *tensors: (function if tf.executing_eagerly() else traced)(*map(tf.convert_to_tensor, tensors))

        _damped_inverse_root = _once_per_shape(_damped_inverse_root_tensorflow)
    else:
        import jax

        _inverse = gauss_jordan

        def _trace(matrix):
            # A strided slice: XLA would read the whole matrix for a sum under a mask.
            size = matrix.shape[-1]
            return ops.sum(ops.reshape(matrix, (*matrix.shape[:-2], size * size))[..., :: size + 1], axis=-1)

        def _once_per_shape(function):
            # Every device inverts by itself. Split over devices, the elimination would cross them for every pivot.
            jitted = jax.jit(function)
            return lambda matrix, damping: laid_out(jitted(laid_out(matrix), damping))

        def _inverse_root_in_graph(matrix, damping):
            damped, bound, identity = _damped(matrix, damping, 4)
            root = gauss_jordan(damped, is_root=True)
            return ops.where(ops.isfinite(root[..., -1:, -1:]), root, identity / ops.sqrt(bound))

        _inverse_root_of = _once_per_shape(_inverse_root_in_graph)

        def _damped_inverse_root(matrix, damping, rows):
            return ops.nan_to_num(_inverse_root_of(matrix, damping) @ rows, nan=0.0, posinf=0.0, neginf=0.0)

    def _is_in_numbers(matrix):
        return False

    # Layers whose matrices have one shape share a trace.
    _damped_inverse = _once_per_shape(_damped_inverse_in_graph)
