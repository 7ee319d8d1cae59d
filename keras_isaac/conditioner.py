"""The equations of the paper on matrices; it knows no layers.

*ISAAC Newton: Input-based Approximate Curvature for Newton's Method*, Petersen et al., ICLR 2023 (arXiv 2305.00604).
With X the input rows of a layer `[..., rows, in]`, G the gradient with respect to its output `[..., rows, out]` and
∇ = XᵀG the gradient of its kernel `[..., in, out]`, the conditioned gradient is

    ζ* = λ (λI + XᵀX/r)⁻¹ ∇      (r rows; λ is the damping, λ_a in the paper)

and, by the push-through identity, ζ* = Xᵀ P G with P = λ (λI + XXᵀ/r)⁻¹. Leading axes are independent groups.

Three forms compute it, each the cheapest somewhere:

- *sample side*, Xᵀ P G: an inverse `[rows, rows]`, where G is at hand;
- *feature side*, λ (λI + FᵀF/s)⁻¹ ∇: an inverse `[in, in]`, from any s rows F `[..., s, in]`;
- *Woodbury*, ∇ - (RF)ᵀ RF∇ with RᵀR = (sλI + FFᵀ)⁻¹: an inverse `[s, s]`, where few rows F stand for many.

With a finite output damping (λ_g in the paper, Remark 4) the other side is conditioned alike, by the empirical Fisher matrix:

    ζ = ζ* μ (μI + GᵀG/r)⁻¹      (μ = λ_g/r², since rG are the gradients of the rows' own losses under a mean loss)

A relative damping is in units of the mean eigenvalue, tr(XᵀX) / (r min(r, in)), so that the scale of the inputs cancels: it
multiplies the mean of the diagonal of whichever matrix is inverted. A gradient that preserves the norm is ζ ‖∇‖ / ‖ζ‖.
"""

# `@` stands for `keras.ops.matmul`, which returns float32 for float64 on PyTorch.

import keras
import numpy as np
from keras import ops

from keras_isaac.inverse import damped_inverse, damped_inverse_root, damping_relative_to

_GOLDEN = (5**0.5 - 1) / 2


def conditioned_gradient(
    rows, output_gradient, damping, output_damping=None, *, max_rows=None, relative_damping=False, preserve_norm=False
):
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
        relative_damping: boolean, whether the dampings are in units of the mean eigenvalue.
        preserve_norm: boolean, whether the result is scaled to the norm of XᵀG.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows, output_gradient, damping = _in_one_dtype(rows, output_gradient, damping)
    options = {"relative_damping": relative_damping, "preserve_norm": preserve_norm}
    if output_damping is None:
        return _conditioned_by_inputs(rows, output_gradient, damping, max_rows, **options)
    _, output_damping = _in_one_dtype(rows, output_damping)
    if not relative_damping:
        output_damping = mean_loss_damping(output_damping, _num_rows(rows))

    def few():
        p = _sample_side(output_gradient, _transpose(output_gradient), output_damping, relative_damping)
        result = _conditioned_by_inputs(rows, p @ output_gradient, damping, max_rows, relative_damping=relative_damping)
        return _with_norm_of_product(rows, output_gradient, result) if preserve_norm else result

    def many():
        gradient = _conditioned_by_inputs(rows, output_gradient, damping, max_rows, **options)
        return condition_outputs(gradient, spread(output_gradient, max_rows), output_damping, **options)

    return _if_at_most(_limit(output_gradient, max_rows), output_gradient, few, many)


def _conditioned_by_inputs(rows, output_gradient, damping, max_rows, *, relative_damping, preserve_norm=False):
    transposed = _transpose(rows)

    def few():
        p = _sample_side(rows, transposed, damping, relative_damping)
        # P is multiplied into the narrower of the two factors.
        if rows.shape[-1] < output_gradient.shape[-1]:
            result = (transposed @ p) @ output_gradient
        else:
            result = transposed @ (p @ output_gradient)
        return _with_norm_of_product(rows, output_gradient, result) if preserve_norm else result

    def many():
        options = {"relative_damping": relative_damping, "preserve_norm": preserve_norm}
        return condition(transposed @ output_gradient, spread(rows, max_rows), damping, **options)

    return _if_at_most(_limit(rows, max_rows), rows, few, many)


def _limit(rows, max_rows):
    """Up to so many rows `[..., rows, features]`, the sample side is the cheapest."""
    return rows.shape[-1] if max_rows is None else min(rows.shape[-1], max_rows)


def condition_outputs(gradient, output_gradient, damping, num_rows=None, **options):
    """Returns ∇ μ (μI + GᵀG/r)⁻¹: as `condition`, on the outputs' axis `[..., in, out]` by rows `[..., rows, out]`."""
    return _transpose(condition(_transpose(gradient), output_gradient, damping, num_rows, **options))


def mean_loss_damping(output_damping, num_rows):
    """Returns μ = λ_g/r², which stands beside the gradients of a loss that is a mean over r rows."""
    return output_damping / num_rows / num_rows


def condition(gradient, rows, damping, num_rows=None, *, relative_damping=False, preserve_norm=False):
    """Returns λ (λI + FᵀF/s)⁻¹ ∇, a finished kernel gradient conditioned on rows, by the Woodbury form or the feature side.

    Args:
        gradient: tensor `[..., in, out]` (∇).
        rows: tensor `[..., rows, in]` (F).
        damping: scalar tensor (λ).
        num_rows: scalar tensor, how many of the rows count (s), where others are zero. Defaults to `None`: all count.
        relative_damping: boolean, whether the damping is in units of the mean eigenvalue.
        preserve_norm: boolean, whether the result is scaled to the norm of ∇.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows, gradient, damping = _in_one_dtype(rows, gradient, damping)
    if num_rows is not None:
        num_rows = ops.cast(num_rows, rows.dtype)
        num_rows = ops.where(num_rows < 1, ops.ones_like(num_rows), num_rows)

    def few():
        # A difference: it keeps nothing of a gradient that a smaller damping would shorten by more than the dtype's digits.
        gram = rows @ _transpose(rows)
        # Through the root, since the inverse itself would leave noise as long as the gradient along rows that are all but
        # dependent. Where FFᵀ is not finite, the gradient stays as it is; one that is not finite does so too.
        whitened = damped_inverse_root(gram, _summed_damping(gram, damping, rows, num_rows, relative_damping), rows)
        return gradient - _transpose(whitened) @ (whitened @ gradient)

    def many():
        gram = _transpose(rows) @ rows
        summed_damping = _summed_damping(gram, damping, rows, num_rows, relative_damping)
        return (summed_damping * damped_inverse(gram, summed_damping)) @ gradient

    result = _if_at_most(rows.shape[-1] - 1, rows, few, many)
    return with_norm_of(gradient, result) if preserve_norm else result


def with_norm_of(gradient, conditioned):
    """Returns the conditioned gradient, as long as the gradient."""
    return conditioned * _ratio_of_norms(gradient * gradient, conditioned * conditioned)


def spread(rows, max_rows, axis=-2):
    """Returns at most `max_rows` of the rows along an axis, evenly spread over them; all for `None`."""
    num_rows = ops.shape(rows)[axis]
    if max_rows is None or (isinstance(num_rows, int) and num_rows <= max_rows):
        return rows
    return ops.take(rows, spread_indices(num_rows, max_rows), axis=axis)


def spread_indices(num_rows, max_rows):
    """Returns at most `max_rows` indices below `num_rows`, one in each of as many equal strata: of NumPy for an integer.

    Rows are samples by positions. A constant stride could meet the same position of every sample, so the place within the
    stratum moves by the golden ratio, which spreads it evenly.
    """
    if isinstance(num_rows, int):
        strata = np.arange(min(num_rows, max_rows))
        return ((strata + strata * _GOLDEN % 1.0) / len(strata) * num_rows).astype("int32")
    num_rows = ops.cast(num_rows, "float64")
    num_strata = ops.minimum(num_rows, max_rows)
    strata = ops.arange(0, num_strata, dtype="float64")
    return ops.cast((strata + strata * _GOLDEN % 1.0) / num_strata * num_rows, "int32")


def _if_at_most(limit, rows, few, many):
    """Chooses between two computations by the number of rows: while tracing where it is known, else in the graph."""
    if rows.shape[-2] is not None:
        return few() if rows.shape[-2] <= limit else many()
    return ops.cond(ops.shape(rows)[-2] <= limit, few, many)


def _sample_side(rows, transposed, damping, relative_damping):
    """Returns P = λ (λI + XXᵀ/r)⁻¹ of the rows and of the same transposed, to stand between them and other rows.

    The authors form P as `I - M (λI + M)⁻¹`, which is the same matrix, but loses its digits as λ falls.
    """
    gram = rows @ transposed
    damping = _summed_damping(gram, damping, rows, None, relative_damping)
    return damping * damped_inverse(gram, damping)


def _with_norm_of_product(rows, output_gradient, conditioned):
    """Returns the conditioned gradient, as long as XᵀG; its norm is the sum of XXᵀ ∘ GGᵀ, without another such product."""
    grams = (rows @ _transpose(rows)) * (output_gradient @ _transpose(output_gradient))
    return conditioned * _ratio_of_norms(grams, conditioned * conditioned)


def _summed_damping(gram, damping, rows, num_rows, is_relative):
    """Returns the damping that stands beside a Gram matrix, a sum over rows: λr, for a relative one as for another."""
    if not is_relative:
        return damping * (_num_rows(rows) if num_rows is None else num_rows)
    rank = _num_rows(gram) if num_rows is None else ops.where(num_rows < rows.shape[-1], num_rows, rows.shape[-1])
    return damping_relative_to(gram, damping, rank)


def _ratio_of_norms(squares, conditioned_squares):
    """Returns ‖∇‖ / ‖ζ‖, at least 1, since conditioning only shortens; both given by what sums to their squares."""
    square, conditioned_square = ops.sum(squares), ops.sum(conditioned_squares)
    # Not where nothing is left of either, where rounding has left less than nothing, and where a square overflows.
    is_short = (conditioned_square > 0) & (conditioned_square < square) & (square < float("inf"))
    return ops.sqrt(ops.where(is_short, square / conditioned_square, 1.0))


def _in_one_dtype(rows, *others):
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (rows, *others)]
    wanted = "float64" if dtypes[0] == "float64" else "float32"
    return [x if dtype == wanted else ops.cast(x, wanted) for x, dtype in zip((rows, *others), dtypes, strict=True)]


def _num_rows(rows):
    """The number of rows, a Python number where it is known while tracing."""
    return ops.cast(ops.shape(rows)[-2], rows.dtype) if rows.shape[-2] is None else rows.shape[-2]


def _transpose(matrix):
    return ops.swapaxes(matrix, -2, -1)
