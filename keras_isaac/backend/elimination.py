"""Inverses by elimination, for JAX on a CPU.

XLA on the CPU has no factorization of its own: it calls a LAPACK whose threads contend with XLA's, and a single small Cholesky
can double a training step. These forms need none, and their compile time does not grow with the matrix. A GPU or a TPU would
wait for each iteration of a loop. If a pivot is not positive, the results are NaN.
"""

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

# Up to so many rows, `swept_inverse` takes two thirds of the time of `gauss_jordan`.
_MAX_SWEPT = 256
# Rows eliminated at a time. Measured on 2 CPU cores: 32 is best or near it for matrices of 128 to 512 rows. Up to 64 rows,
# eliminating one at a time is as fast, and compiles in a third of the time.
_BLOCK, _UNBLOCKED = 32, 64


def inverse(matrix: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns the inverse of symmetric matrices.

    Args:
        matrix: tensor `[..., k, k]`.
        bound: tensor that broadcasts to `[..., 1, 1]`, no less than the largest eigenvalue.
    """
    return swept_inverse(matrix, bound) if matrix.shape[-1] <= _MAX_SWEPT else gauss_jordan(matrix)


def swept_inverse(matrix: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns the inverse by the sweep operator (Goodnight, 1979), two pivots at a time. Arguments as those of `inverse`.

    A pivot p, whose row is a, subtracts uuᵀ/p from the matrix, with u = a - e and e the unit vector of the pivot. One formula
    for all entries lets XLA work in place. What is left of a matrix A is 2I - A⁻¹. No digits cancel if the eigenvalues of A
    are at most 1.
    """
    size = matrix.shape[-1]
    # A power of two, so that scaling does not round: a small damping on a large diagonal is just resolved.
    scale = jnp.ldexp(jnp.ones_like(bound), -jnp.frexp(bound)[1])
    swept = _padded(matrix * scale, size % 2)
    columns = jnp.arange(swept.shape[-1])

    def sweep(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        swept, left, right = state
        # By the pivots before. As a part of the state, the factors are computed once, and not for every entry.
        swept = swept - left[..., :1, :].mT * right[..., :1, :] - left[..., 1:, :].mT * right[..., 1:, :]
        rows = dynamic_slice_in_dim(swept, 2 * i, 2, axis=-2)
        block = dynamic_slice_in_dim(rows, 2 * i, 2, axis=-1)
        first, product, second = block[..., :1, :1], block[..., :1, 1:], block[..., 1:, 1:]
        upper = rows[..., :1, :] - (columns == 2 * i)
        # After the first pivot is swept.
        lower = rows[..., 1:, :] - (columns == 2 * i + 1) - product / first * upper
        divided = upper * (1 / _positive(first)), lower * (1 / _positive(second - product / first * product))
        return swept, jnp.concatenate([upper, lower], axis=-2), jnp.concatenate(divided, axis=-2)

    # The first iteration subtracts nothing, and nothing reads the factors of the last one.
    nothing = jnp.zeros_like(swept[..., :2, :])
    swept, *_ = jax.lax.fori_loop(0, swept.shape[-1] // 2 + 1, sweep, (swept, nothing, nothing))
    return (2 * jnp.eye(size, dtype=matrix.dtype) - swept[..., :size, :size]) * scale


def gauss_jordan(matrix: jax.Array, is_root: bool = False) -> jax.Array:
    """Blocked Gauss-Jordan elimination without pivoting, in matrix products and one loop.

    Args:
        matrix: tensor `[..., k, k]`, symmetric.
        is_root: boolean, whether rows are eliminated only from those below them, and scaled by the root of their pivots,
            which gives the inverse of the Cholesky factor. Defaults to `False`: from all, which gives the inverse.
    """
    size = matrix.shape[-1]
    if size <= _UNBLOCKED:
        return _gauss_jordan_unblocked(matrix, is_root)
    matrix = _padded(matrix, -size % _BLOCK)
    index = jnp.arange(matrix.shape[-1])

    def eliminate(i: jax.Array, matrix: jax.Array) -> jax.Array:
        start = i * _BLOCK
        in_block = (index >= start) & (index < start + _BLOCK)
        rows = dynamic_slice_in_dim(matrix, start, _BLOCK, axis=-2)
        columns = dynamic_slice_in_dim(matrix, start, _BLOCK, axis=-1)
        pivot = _gauss_jordan_unblocked(dynamic_slice_in_dim(rows, start, _BLOCK, axis=-1), is_root)
        rows = dynamic_update_slice_in_dim(pivot @ rows, pivot, start, axis=-1)
        if is_root:
            columns = jnp.where((index >= start + _BLOCK)[:, None], columns, 0) @ pivot.mT
        else:
            columns = jnp.where(in_block[:, None], 0, columns)
        matrix = jnp.where(in_block, 0, matrix) - columns @ rows
        return dynamic_update_slice_in_dim(matrix, rows, start, axis=-2)

    return jax.lax.fori_loop(0, len(index) // _BLOCK, eliminate, matrix)[..., :size, :size]


def _gauss_jordan_unblocked(matrix: jax.Array, is_root: bool) -> jax.Array:
    size = matrix.shape[-1]

    def eliminate(i: jax.Array | int, matrix: jax.Array) -> jax.Array:
        # Computed inside the loop, so that it is not an operand of it.
        index = jnp.arange(size)
        row = dynamic_slice_in_dim(matrix, i, 1, axis=-2)
        column = dynamic_slice_in_dim(matrix, i, 1, axis=-1)
        pivot = _positive(dynamic_slice_in_dim(row, i, 1, axis=-1))
        row = jnp.where(index == i, 1, row)
        if is_root:
            pivot = jnp.sqrt(pivot)
            column = jnp.where((index > i)[:, None], column, 0) / pivot
        else:
            column = jnp.where((index == i)[:, None], 0, column)
        row = row / pivot
        matrix = jnp.where(index == i, 0, matrix) - column * row
        return dynamic_update_slice_in_dim(matrix, row, i, axis=-2)

    # Two eliminations per iteration write to each other's buffer. With a single one, XLA would copy its result back.
    matrix = jax.lax.fori_loop(0, size // 2, lambda i, matrix: eliminate(2 * i + 1, eliminate(2 * i, matrix)), matrix)
    return eliminate(size - 1, matrix) if size % 2 else matrix


def _padded(matrix: jax.Array, padding: int) -> jax.Array:
    """Returns the matrix with further rows and columns of the identity."""
    if not padding:
        return matrix
    size = matrix.shape[-1]
    is_new = jnp.arange(size + padding) >= size
    return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, padding)] * 2) + jnp.diag(is_new.astype(matrix.dtype))


def _positive(pivot: jax.Array) -> jax.Array:
    """Returns the pivot; NaN if it is not positive, which those of a positive definite matrix are."""
    return jnp.where(pivot > 0, pivot, jnp.nan)
