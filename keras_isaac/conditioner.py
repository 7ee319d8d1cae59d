"""The equations of the paper on matrices; it knows no layers.

*ISAAC Newton: Input-based Approximate Curvature for Newton's Method*, Petersen et al., ICLR 2023 (arXiv 2305.00604).
With X the input rows of a layer `[..., rows, in]`, G the gradient with respect to its output `[..., rows, out]` and
∇ = XᵀG the gradient of its kernel `[..., in, out]`, the conditioned gradient is

    ζ* = λ (λI + XᵀX/r)⁻¹ ∇      (r rows; λ is the damping, λ_a in the paper)

and, by the push-through identity, ζ* = Xᵀ P G with P = λ (λI + XXᵀ/r)⁻¹. Leading axes are independent groups.

Three forms compute it, each the cheapest somewhere:

- *sample side*, Xᵀ P G: an inverse `[rows, rows]`, where G is at hand;
- *feature side*, λ (λI + FᵀF/s)⁻¹ ∇: an inverse `[in, in]`, from any s rows F `[..., s, in]`;
- *Woodbury*, ∇ - Fᵀ (sλI + FFᵀ)⁻¹ F∇: an inverse `[s, s]`, where few rows F stand for many.
"""

import keras
import numpy as np
from keras import ops

from keras_isaac.inverse import positive_definite_inverse


def conditioned_gradient(rows, output_gradient, damping, max_rows=None):
    """Returns ζ*, the gradient of a kernel conditioned on the layer's inputs.

    With no more rows than features, and than `max_rows`, by the sample side; else as `condition` does, with at most
    `max_rows` rows to stand for all. Computed in float32, or in float64 for float64 rows. Nothing raises: where `rows` or
    `output_gradient` is not finite, neither is the result.

    Args:
        rows: tensor `[..., rows, in]`, the layer's inputs (X).
        output_gradient: tensor `[..., rows, out]`, the loss gradient with respect to the layer's product (G).
        damping: scalar tensor (λ). Below what the dtype can resolve it is raised inside the inverse, so that a vanishing
            damping tends to the pseudo-inverse.
        max_rows: integer, or `None` for all rows.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows, output_gradient, damping = _in_one_dtype(rows, output_gradient, damping)
    limit = rows.shape[-1] if max_rows is None else min(rows.shape[-1], max_rows)

    def few():
        return _sample_side(rows, output_gradient, damping)

    def many():
        return condition(_transpose(rows) @ output_gradient, spread(rows, max_rows), damping)

    return _if_at_most(limit, rows, few, many)


def condition(gradient, rows, damping, num_rows=None):
    """Returns λ (λI + FᵀF/s)⁻¹ ∇, a finished kernel gradient conditioned on rows, by the Woodbury form or the feature side.

    Args:
        gradient: tensor `[..., in, out]` (∇).
        rows: tensor `[..., rows, in]` (F).
        damping: scalar tensor (λ).
        num_rows: scalar tensor, how many of the rows count (s), where others are zero. Defaults to `None`: all count.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows, gradient, damping = _in_one_dtype(rows, gradient, damping)
    num_rows = ops.cast(ops.shape(rows)[-2] if num_rows is None else num_rows, rows.dtype)
    num_rows = ops.where(num_rows < 1, ops.ones_like(num_rows), num_rows)
    rows, damping = _scaled(rows, damping)

    def few():
        # Unchanged by the scale of F and λ together, so that the scaled ones serve.
        inverse = _damped_inverse(rows @ _transpose(rows) / num_rows, damping)
        return gradient - _transpose(rows) @ (inverse @ (rows @ gradient)) / num_rows

    def many():
        inverse = _damped_inverse(_transpose(rows) @ rows / num_rows, damping)
        return (damping * inverse) @ gradient

    return _if_at_most(rows.shape[-1] - 1, rows, few, many)


def spread(rows, max_rows):
    """Returns at most `max_rows` of the rows `[..., rows, in]`, evenly spread over them; all for `None`."""
    if max_rows is None:
        return rows
    return _if_at_most(
        max_rows, rows, lambda: rows, lambda: ops.take(rows, _spread_indices(ops.shape(rows)[-2], max_rows), axis=-2)
    )


def _spread_indices(num_rows, max_rows):
    """Returns `max_rows` indices below `num_rows`: one in each of as many equal strata.

    Rows are samples by positions. A constant stride could meet the same position of every sample, so the place within the
    stratum moves by the golden ratio, which spreads it evenly.
    """
    strata = np.arange(max_rows)
    places = (strata + strata * 0.6180339887498949 % 1.0) / max_rows
    if isinstance(num_rows, int):
        return (places * num_rows).astype("int32")
    return ops.cast(ops.cast(places, "float64") * ops.cast(num_rows, "float64"), "int32")


def _if_at_most(limit, rows, few, many):
    """Chooses between two computations by the number of rows: while tracing where it is known, else in the graph."""
    if rows.shape[-2] is not None:
        return few() if rows.shape[-2] <= limit else many()
    return ops.cond(ops.shape(rows)[-2] <= limit, few, many)


# Below, `@` and `where` stand for `keras.ops.matmul`, `maximum` and `minimum`, which return float32 for float64 on PyTorch.


def _sample_side(rows, output_gradient, damping):
    """ζ* = Xᵀ P G, with P multiplied into the narrower of the two factors."""
    scaled, scaled_damping = _scaled(rows, damping)
    num_rows = ops.cast(ops.shape(rows)[-2], rows.dtype)
    p = scaled_damping * _damped_inverse(scaled @ _transpose(scaled) / num_rows, scaled_damping)
    if rows.shape[-1] <= output_gradient.shape[-1]:
        return _transpose(p @ rows) @ output_gradient
    return _transpose(rows) @ (p @ output_gradient)


def _damped_inverse(curvature, damping):
    """Returns (λI + M)⁻¹ for the positive semidefinite `curvature` M `[..., k, k]`.

    λ times it is P. The authors form P as `I - M (λI + M)⁻¹`, which is the same matrix, but loses its digits as λ falls.
    """
    dtype = keras.backend.standardize_dtype(curvature.dtype)
    epsilon, smallest = (2.0**-52, 2.0**-1022) if dtype == "float64" else (2.0**-23, 2.0**-126)
    size = ops.shape(curvature)[-1]
    identity = ops.eye(size, dtype=dtype)
    trace = ops.sum(curvature * identity, axis=(-2, -1), keepdims=True)
    mean_eigenvalue = trace / ops.cast(size, dtype)
    # Less than this is lost in the sum.
    floor = epsilon * mean_eigenvalue
    resolved = ops.where(damping < floor, floor, damping)
    # Division by the size of the matrix keeps the inverse in range; the smallest normal number stands in for 0/0.
    total = resolved + mean_eigenvalue
    total = ops.where(total < smallest, smallest, total)
    inverse = positive_definite_inverse((curvature + resolved * identity) / total) / total
    # Rounding can leave a singular matrix indefinite. Then 1/(λ + tr M), a bound from below, takes the inverse's place: the
    # step is the plain gradient's, shortened. A non-finite matrix has a non-finite trace, so that NaN remains NaN.
    bound = damping + trace
    bound = 1.0 / ops.where(bound < smallest, smallest, bound)
    invertible = ops.all(ops.isfinite(inverse), axis=(-2, -1), keepdims=True)
    return ops.where(invertible, inverse, bound * identity)


def _scaled(rows, damping):
    """Divides the rows by their largest entry s and the damping by s², so that XXᵀ overflows for no finite X."""
    largest = ops.max(ops.abs(rows), axis=(-2, -1), keepdims=True)
    largest = ops.where(largest == 0, 1.0, largest)
    damping = damping / largest / largest
    # From 1e30 on, the damping outweighs the scaled curvature by more than the digits of any dtype.
    return rows / largest, ops.where(damping > 1e30, 1e30, damping)


def _in_one_dtype(rows, *others):
    dtype = "float64" if keras.backend.standardize_dtype(rows.dtype) == "float64" else "float32"
    return [ops.cast(x, dtype) for x in (rows, *others)]


def _transpose(matrix):
    return ops.swapaxes(matrix, -2, -1)
