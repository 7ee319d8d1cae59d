"""The equations of the paper on matrices; it knows no layers.

*ISAAC Newton: Input-based Approximate Curvature for Newton's Method*, Petersen et al., ICLR 2023 (arXiv 2305.00604).
With X the input rows of a layer `[..., rows, in]`, G the gradient with respect to its output `[..., rows, out]` and
∇ = XᵀG the gradient of its kernel `[..., in, out]`, the conditioned gradient is

    ζ* = λ (λI + XᵀX/r)⁻¹ ∇      (r rows; λ is the damping, λ_a in the paper)

and, by the push-through identity, ζ* = Xᵀ P G with P = λ (λI + XXᵀ/r)⁻¹. Leading axes are independent groups.
"""

import keras
from keras import ops

from keras_isaac.inverse import positive_definite_inverse


def conditioned_gradient(rows, output_gradient, damping):
    """Returns ζ*, the gradient of a kernel conditioned on the layer's inputs.

    The smaller of the two matrices is inverted: `[rows, rows]` (sample side) when there are no more rows than features, else
    `[in, in]` (feature side). Computed in float32, or in float64 for float64 rows. Nothing raises: where `rows` or
    `output_gradient` is not finite, neither is the result.

    Args:
        rows: tensor `[..., rows, in]`, the layer's inputs (X).
        output_gradient: tensor `[..., rows, out]`, the loss gradient with respect to the layer's product (G).
        damping: scalar tensor (λ). Below what the dtype can resolve it is raised inside the inverse, so that a vanishing
            damping tends to the pseudo-inverse.

    Returns:
        Tensor `[..., in, out]`.
    """
    dtype = "float64" if keras.backend.standardize_dtype(rows.dtype) == "float64" else "float32"
    rows, output_gradient, damping = (ops.cast(x, dtype) for x in (rows, output_gradient, damping))
    num_features = rows.shape[-1]
    if rows.shape[-2] is not None:
        side = _sample_side if rows.shape[-2] <= num_features else _feature_side
        return side(rows, output_gradient, damping)
    return ops.cond(
        ops.shape(rows)[-2] <= num_features,
        lambda: _sample_side(rows, output_gradient, damping),
        lambda: _feature_side(rows, output_gradient, damping),
    )


# Below, `@` and `where` stand for `keras.ops.matmul`, `maximum` and `minimum`, which return float32 for float64 on PyTorch.


def _sample_side(rows, output_gradient, damping):
    """ζ* = Xᵀ P G, with P multiplied into the narrower of the two factors."""
    scaled, scaled_damping = _scaled(rows, damping)
    p = _damped_inverse(scaled @ _transpose(scaled) / _num_rows(rows), scaled_damping)
    if rows.shape[-1] <= output_gradient.shape[-1]:
        return _transpose(p @ rows) @ output_gradient
    return _transpose(rows) @ (p @ output_gradient)


def _feature_side(rows, output_gradient, damping):
    """ζ* = λ (λI + XᵀX/r)⁻¹ ∇."""
    scaled, scaled_damping = _scaled(rows, damping)
    inverse = _damped_inverse(_transpose(scaled) @ scaled / _num_rows(rows), scaled_damping)
    return inverse @ (_transpose(rows) @ output_gradient)


def _damped_inverse(curvature, damping):
    """Returns λ (λI + M)⁻¹ for the positive semidefinite `curvature` M `[..., k, k]`.

    Formed directly: `I - M (λI + M)⁻¹` is the same matrix but loses every digit to cancellation once λ is small.
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
    p = positive_definite_inverse((curvature + resolved * identity) / total) * (damping / total)
    # Rounding can leave a singular matrix indefinite. Then λ/(λ + tr M), a bound from below, takes the inverse's place: the
    # step is the plain gradient's, shortened. A non-finite matrix has a non-finite trace, so that NaN remains NaN.
    bound = damping + trace
    bound = damping / ops.where(bound < smallest, smallest, bound)
    invertible = ops.all(ops.isfinite(p), axis=(-2, -1), keepdims=True)
    return ops.where(invertible, p, bound * identity)


def _scaled(rows, damping):
    """Divides the rows by their largest entry s and the damping by s², so that XXᵀ overflows for no finite X."""
    largest = ops.max(ops.abs(rows), axis=(-2, -1), keepdims=True)
    largest = ops.where(largest == 0, 1.0, largest)
    damping = damping / largest / largest
    # From 1e30 on, the damping outweighs the scaled curvature by more than the digits of any dtype.
    return rows / largest, ops.where(damping > 1e30, 1e30, damping)


def _num_rows(rows):
    return ops.cast(ops.shape(rows)[-2], rows.dtype)


def _transpose(matrix):
    return ops.swapaxes(matrix, -2, -1)
