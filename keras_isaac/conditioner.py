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

With a finite output damping (λ_g in the paper, Remark 4) the other side is conditioned alike, by the empirical Fisher matrix:

    ζ = ζ* μ (μI + GᵀG/r)⁻¹      (μ = λ_g/r², since rG are the gradients of the rows' own losses under a mean loss)
"""

# `@` stands for `keras.ops.matmul`, which returns float32 for float64 on PyTorch.

import keras
import numpy as np
from keras import ops

from keras_isaac.inverse import damped_inverse


def conditioned_gradient(rows, output_gradient, damping, output_damping=None, max_rows=None):
    """Returns ζ*, the gradient of a kernel conditioned on the layer's inputs, or ζ with an output damping.

    With no more rows than features, and than `max_rows`, by the sample side; else as `condition` does, with at most
    `max_rows` rows to stand for all. Computed in float32, or in float64 for float64 rows. Nothing raises: where `rows` or
    `output_gradient` is not finite, neither is the result. Where XXᵀ overflows (rows beyond 1e18), it vanishes.

    Args:
        rows: tensor `[..., rows, in]`, the layer's inputs (X).
        output_gradient: tensor `[..., rows, out]`, the loss gradient with respect to the layer's product (G).
        damping: scalar tensor (λ). Below what the dtype can resolve it is raised inside the inverse, so that a vanishing
            damping tends to the pseudo-inverse.
        output_damping: scalar tensor (λ_g), or `None` for an infinite one.
        max_rows: integer, or `None` for all rows.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows, output_gradient, damping = _in_one_dtype(rows, output_gradient, damping)
    if output_damping is None:
        return _conditioned_by_inputs(rows, output_gradient, damping, max_rows)
    output_damping = mean_loss_damping(output_damping, _num_rows(rows))

    def few():
        p = _sample_side(output_gradient, _transpose(output_gradient), output_damping)
        gradient = p @ output_gradient
        return _conditioned_by_inputs(rows, gradient, damping, max_rows)

    def many():
        gradient = _conditioned_by_inputs(rows, output_gradient, damping, max_rows)
        return condition_outputs(gradient, spread(output_gradient, max_rows), output_damping)

    return _if_at_most(_limit(output_gradient, max_rows), output_gradient, few, many)


def _conditioned_by_inputs(rows, output_gradient, damping, max_rows):
    transposed = _transpose(rows)

    def few():
        p = _sample_side(rows, transposed, damping)
        # P is multiplied into the narrower of the two factors.
        if rows.shape[-1] < output_gradient.shape[-1]:
            return (transposed @ p) @ output_gradient
        return transposed @ (p @ output_gradient)

    def many():
        return condition(transposed @ output_gradient, spread(rows, max_rows), damping)

    return _if_at_most(_limit(rows, max_rows), rows, few, many)


def _limit(rows, max_rows):
    """Up to so many rows `[..., rows, features]`, the sample side is the cheapest."""
    return rows.shape[-1] if max_rows is None else min(rows.shape[-1], max_rows)


def condition_outputs(gradient, output_gradient, damping, num_rows=None):
    """Returns ∇ μ (μI + GᵀG/r)⁻¹: as `condition`, on the outputs' axis `[..., in, out]` by rows `[..., rows, out]`."""
    return _transpose(condition(_transpose(gradient), output_gradient, damping, num_rows))


def mean_loss_damping(output_damping, num_rows):
    """Returns μ = λ_g/r², which stands beside the gradients of a loss that is a mean over r rows."""
    return output_damping / num_rows / num_rows


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
    if num_rows is None:
        num_rows = _num_rows(rows)
    else:
        num_rows = ops.cast(num_rows, rows.dtype)
        num_rows = ops.where(num_rows < 1, ops.ones_like(num_rows), num_rows)
    damping = damping * num_rows

    def few():
        # A difference: it keeps nothing of a gradient that a smaller damping would shorten by more than the dtype's digits.
        inverse = damped_inverse(rows @ _transpose(rows), damping, floor=4)
        return gradient - _transpose(rows) @ (inverse @ (rows @ gradient))

    def many():
        inverse = damped_inverse(_transpose(rows) @ rows, damping)
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


def _sample_side(rows, transposed, damping):
    """Returns P = λ (λI + XXᵀ/r)⁻¹ of the rows and of the same transposed.

    The authors form P as `I - M (λI + M)⁻¹`, which is the same matrix, but loses its digits as λ falls.
    """
    damping = damping * _num_rows(rows)
    return damping * damped_inverse(rows @ transposed, damping)


def _in_one_dtype(rows, *others):
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (rows, *others)]
    wanted = "float64" if dtypes[0] == "float64" else "float32"
    return [x if dtype == wanted else ops.cast(x, wanted) for x, dtype in zip((rows, *others), dtypes, strict=True)]


def _num_rows(rows):
    """The number of rows, a Python number where it is known while tracing."""
    return ops.cast(ops.shape(rows)[-2], rows.dtype) if rows.shape[-2] is None else rows.shape[-2]


def _transpose(matrix):
    return ops.swapaxes(matrix, -2, -1)
