"""The equations of the paper as functions of matrices, one for each form. They depend on no layers and take no derivatives.

*ISAAC Newton: Input-based Approximate Curvature for Newton's Method*, Petersen et al., ICLR 2023 (arXiv 2305.00604).
With X the input rows of a layer `[..., rows, in]`, G the gradient with respect to its output `[..., rows, out]` and
∇ = XᵀG the gradient of its kernel `[..., in, out]`, the conditioned gradient is

    ζ* = λ (λI + XᵀX/r)⁻¹ ∇      (r rows; λ is the damping, λ_a in the paper)

and, by the push-through identity, ζ* = Xᵀ P G with P = λ (λI + XXᵀ/r)⁻¹. Leading axes are independent groups.

With a finite output damping (λ_g in the paper, Remark 4) the output side is conditioned likewise, by the empirical Fisher
matrix:

    ζ = ζ* μ (μI + GᵀG/r)⁻¹      (μ = λ_g/r², since rG are the gradients of the rows' own losses under a mean loss)

A relative damping is in units of the mean eigenvalue, tr(XᵀX) / (r min(r, in)), so that the scale of the inputs does not
matter: it multiplies the mean of the diagonal of whichever matrix is inverted.

Everything is computed in float32 (in float64 for float64 rows) and in full precision. Nothing raises: if rows or gradients are
not finite, the result is not finite either.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_isaac.backend import clip, damped_gram, damped_inverse_root, damped_projection, matmul, traced_once, transpose
from keras_isaac.curvature import plan


@traced_once
def sample_side(rows: Any, output_gradient: Any, damping: Any, is_relative: bool = False) -> Any:
    """Returns ζ* = XᵀPG, the gradient of the kernel in `rows @ kernel`: the sample side.

    Args:
        rows: tensor `[..., rows, in]` (X).
        output_gradient: tensor `[..., rows, out]` (G).
        damping: scalar tensor (λ). Inside the inverse it is raised to the smallest value that the dtype resolves, so that a
            damping near zero gives the pseudo-inverse.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.

    Returns:
        Tensor `[..., in, out]`, float32 or float64. Zero if XXᵀ overflows (entries of rows beyond 1e18).
    """
    rows, output_gradient, damping = in_full_precision(rows, output_gradient, damping)
    gram = gram_of(plan.SAMPLE, rows, damping, is_relative)
    # P is multiplied into the narrower of the two factors.
    if rows.shape[-1] <= output_gradient.shape[-1]:
        return transpose(damped_projection(*gram, rows)[0]) @ output_gradient
    return transpose(rows) @ damped_projection(*gram, output_gradient)[0]


@traced_once
def sample_side_tangent(rows: Any, kernel_tangent: Any, damping: Any, is_relative: bool = False) -> Any:
    """Returns P X dW, the tangent of `rows @ kernel` for a tangent `[..., in, out]` of the kernel. Its transpose is XᵀPG."""
    rows, kernel_tangent, damping = in_full_precision(rows, kernel_tangent, damping)
    gram = gram_of(plan.SAMPLE, rows, damping, is_relative)
    if rows.shape[-1] <= kernel_tangent.shape[-1]:
        return damped_projection(*gram, rows)[0] @ kernel_tangent
    return damped_projection(*gram, rows @ kernel_tangent)[0]


@traced_once
def condition(
    gradient: Any,
    rows: Any,
    damping: Any,
    num_sampled: Any = None,
    num_valid: Any = None,
    *,
    form: str | None = None,
    is_relative: bool = False,
) -> Any:
    """Returns λ (λI + FᵀF/s)⁻¹ ∇, a finished gradient conditioned on rows: by the Woodbury form, or on the feature side.

    Linear and symmetric in the gradient.

    Args:
        gradient: tensor `[..., in, out]` (∇).
        rows: tensor `[..., rows, in]` (F).
        damping: scalar tensor (λ).
        num_sampled: the number of rows that `rows` were computed from (s), a number or a tensor that broadcasts to
            `[..., 1, 1]`. Defaults to `None`: the number of `rows`.
        num_valid: how many rows the layer has, likewise, for the unit of a relative damping. Defaults to `None`:
            `num_sampled`.
        form: `"Woodbury"` or `"feature"`. If `None`, it is chosen by the number of rows: in the graph if that is unknown
            while tracing.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.

    Returns:
        Tensor `[..., in, out]` of the gradient's dtype.
    """
    dtype = gradient.dtype
    rows, gradient, damping = in_full_precision(rows, gradient, damping)
    arguments = (gradient, ops.stop_gradient(rows), damping, is_relative, num_sampled, num_valid)
    if form is None:
        few, many = (functools.partial(function, *arguments) for function in (_woodbury, _feature_side))
        result = if_at_most(rows.shape[-1] - 1, rows, few, many)
    else:
        result = (_woodbury if form == plan.WOODBURY else _feature_side)(*arguments)
    return cast(result, dtype)


def _woodbury(gradient: Any, rows: Any, *arguments: Any) -> Any:
    """Returns ∇ - (RF)ᵀ RF∇ with RᵀR = (sλI + FFᵀ)⁻¹, for few rows; the arguments are those of `gram_of`."""
    # Subtracts two nearly equal terms, so it is inaccurate where λ shrinks the gradient below float precision. The inverse
    # itself loses precision if rows are nearly linearly dependent, with errors as large as the gradient; its root does not. If
    # FFᵀ is not finite, the gradient is returned unchanged.
    whitened, _ = damped_inverse_root(*gram_of(plan.WOODBURY, rows, *arguments), rows)
    # The smaller factor is negated, and so it is in the transpose of this linear map.
    return gradient + matmul(transpose(whitened), -matmul(whitened, gradient))


def _feature_side(gradient: Any, rows: Any, *arguments: Any) -> Any:
    """Returns sλ (sλI + FᵀF)⁻¹ ∇, for many rows."""
    return damped_projection(*gram_of(plan.FEATURE, rows, *arguments), gradient)[0]


def condition_product(rows: Any, output_gradient: Any, damping: Any, form: str | None, is_relative: bool, dtype: Any) -> Any:
    """Returns the conditioned gradient of the kernel in `rows @ kernel`, given that of the product.

    Args:
        rows: tensor `[..., rows, in]`.
        output_gradient: tensor `[..., rows, out]`.
        damping: scalar tensor.
        form: `"sample"`, or `None`: chosen in the graph between that and the feature side.
        is_relative: boolean, whether the damping is in units of the mean eigenvalue.
        dtype: of the result.
    """
    if form == plan.SAMPLE:
        conditioned = sample_side(rows, output_gradient, damping, is_relative)
        return conditioned if conditioned.dtype == dtype else ops.cast(conditioned, dtype)
    rows, output_gradient = in_full_precision(rows, output_gradient)

    def few() -> Any:
        return sample_side(rows, output_gradient, damping, is_relative)

    def many() -> Any:
        return condition(transpose(rows) @ output_gradient, rows, damping, form=plan.FEATURE, is_relative=is_relative)

    return cast(if_at_most(rows.shape[-1], rows, few, many), dtype)


def condition_outputs(
    gradient: Any, output_gradient: Any, damping: Any, num_sampled: Any = None, num_valid: Any = None, is_relative: bool = False
) -> Any:
    """Returns ∇ μ (μI + GᵀG/r)⁻¹: as `condition`, on the outputs' axis `[..., in, out]` by rows `[..., rows, out]`."""
    counts = num_sampled, num_valid
    return transpose(condition(transpose(gradient), output_gradient, damping, *counts, is_relative=is_relative))


def with_norm_of(gradient: Any, conditioned: Any) -> Any:
    """Returns the conditioned gradient, scaled to the norm of the gradient."""
    dtype = conditioned.dtype
    gradient, conditioned = in_full_precision(gradient, conditioned)
    square, conditioned_square = ops.sum(gradient * gradient), ops.sum(conditioned * conditioned)
    # Conditioning only shortens gradients. The conditioned gradient is not scaled if either is zero or a square overflows.
    is_short = (conditioned_square > 0) & (conditioned_square < square) & (square < float("inf"))
    return cast(conditioned * ops.sqrt(ops.where(is_short, square / conditioned_square, 1.0)), dtype)


def if_at_most(limit: int, rows: Any, few: Callable[[], Any], many: Callable[[], Any]) -> Any:
    """Returns `few()` for at most `limit` rows, else `many()`; chosen in the graph if the number is unknown while tracing."""
    if rows.shape[-2] is not None:
        return few() if rows.shape[-2] <= limit else many()
    return ops.cond(ops.shape(rows)[-2] <= limit, few, many)


def gram_of(
    form: str | None, rows: Any, damping: Any, is_relative: bool, num_sampled: Any = None, num_valid: Any = None
) -> tuple[Any, Any, Any]:
    """Returns the matrix that a form inverts, as `backend.damped_gram` does: rλI + XXᵀ, or rλI + XᵀX on the feature side.

    For a relative damping δ, rλ is δ tr(M)/rank. The rank is that of all the layer's rows, so that the unit of δ does not
    depend on how many of them are sampled. The authors form P = λ (λI + XXᵀ/r)⁻¹ as `I - M (λI + M)⁻¹`, which is the same
    matrix, but loses precision for small λ.
    """
    count = num_sampled if num_valid is None or not is_relative else num_valid
    if count is None:
        count = ops.shape(rows)[-2] if rows.shape[-2] is None else rows.shape[-2]
    limit = rows.shape[-1] if is_relative else None
    if isinstance(count, int):
        count = max(count if limit is None else min(count, limit), 1)
    else:
        count = clip(ops.cast(count, rows.dtype), 1, limit)
    sides = transpose(rows) if form == plan.FEATURE else rows
    return damped_gram(sides, damping, count, is_relative, form == plan.WOODBURY)


def in_full_precision(rows: Any, *others: Any) -> list[Any]:
    """Returns the tensors in float64 if the first one is, and else in float32."""
    dtype = "float64" if _name_of(rows.dtype) == "float64" else "float32"
    tensors = [rows, *others]
    # A loop avoids a function call, which costs time in eager PyTorch.
    for place, tensor in enumerate(tensors):
        if _name_of(tensor.dtype) != dtype:
            tensors[place] = ops.cast(tensor, dtype)
    return tensors


def cast(tensor: Any, dtype: Any) -> Any:
    """Returns a tensor in a dtype. Skips `ops.cast`, which costs time in eager PyTorch, if it has that dtype already."""
    return tensor if _name_of(tensor.dtype) == _name_of(dtype) else ops.cast(tensor, dtype)


_name_of = functools.cache(keras.backend.standardize_dtype)
