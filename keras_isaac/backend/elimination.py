"""The inverse by elimination, for JAX on a CPU."""

from typing import Any

from keras import ops

# Rows eliminated at a time. Measured on 2 CPU cores: 32 is best or near it for matrices of 128 to 512 rows. Up to 64 rows,
# eliminating one at a time is as fast, and compiles in a third of the time.
_BLOCK, _UNBLOCKED = 32, 64


def gauss_jordan(matrix: Any, is_root: bool = False) -> Any:
    """Blocked Gauss-Jordan elimination without pivoting, in matrix products and one loop; NaN where a pivot is not positive.

    XLA on the CPU has no factorization of its own: it calls a LAPACK whose threads contend with XLA's, and a single small
    Cholesky can double a training step. This form needs none, and its compile time does not grow with the matrix. A GPU or a
    TPU would wait for each iteration of the loop.

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

    def eliminate(i: Any, matrix: Any) -> Any:
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


def _gauss_jordan_unblocked(matrix: Any, is_root: bool) -> Any:
    shape = tuple(matrix.shape)
    origin = (0,) * (len(shape) - 2)

    def eliminate(i: Any, matrix: Any) -> Any:
        # Computed inside the loop, so that it is not an operand of it.
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

    # Two eliminations per iteration write to each other's buffer. With a single one, XLA would copy its result back.
    matrix = ops.fori_loop(0, shape[-1] // 2, lambda i, matrix: eliminate(2 * i + 1, eliminate(2 * i, matrix)), matrix)
    return eliminate(shape[-1] - 1, matrix) if shape[-1] % 2 else matrix
