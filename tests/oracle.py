"""The paper in NumPy float64. It imports nothing of the package, and inverts by eigenvalues, as the package does not."""

import numpy as np


def conditioned_gradient(rows, output_gradient, damping):
    """ζ* = λ (λI + XᵀX/r)⁻¹ XᵀG."""
    rows, output_gradient = np.asarray(rows, "float64"), np.asarray(output_gradient, "float64")
    _, singular, right = np.linalg.svd(rows / np.sqrt(len(rows)), full_matrices=False)
    # The gradient lies in the span of the rows, so that the other singular vectors are not needed.
    return right.T @ ((damping / (damping + singular**2))[:, None] * (right @ (rows.T @ output_gradient)))


def condition(rows, gradient, damping):
    """λ (λI + FᵀF/s)⁻¹ ∇, by the singular values of F, so that every damping is accurate."""
    rows, gradient = np.asarray(rows, "float64"), np.asarray(gradient, "float64")
    _, singular, right = np.linalg.svd(rows / np.sqrt(len(rows)), full_matrices=False)
    inside = right @ gradient
    # What of the gradient is outside the span of the rows is left alone.
    return gradient - right.T @ inside + right.T @ ((damping / (damping + singular**2))[:, None] * inside)


def kfac_gradient(rows, output_gradient, damping, output_damping):
    """ζ = λ_g λ_a (aᵀa/b + λ_a I)⁻¹ ∇ (gᵀg/b + λ_g I)⁻¹, with g one row a sample (not divided by b)."""
    rows, output_gradient = np.asarray(rows, "float64"), np.asarray(output_gradient, "float64")
    num_rows = rows.shape[0]
    left = damping * np.linalg.inv(rows.T @ rows / num_rows + damping * np.eye(rows.shape[1]))
    right = output_gradient.T @ output_gradient / num_rows
    right = output_damping * np.linalg.inv(right + output_damping * np.eye(output_gradient.shape[1]))
    return left @ (rows.T @ output_gradient / num_rows) @ right


def relative_error(actual, expected):
    """‖actual - expected‖ / ‖expected‖ in float64; the absolute norm where nothing is expected."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.linalg.norm(expected)
    return np.linalg.norm(actual - expected) / (scale if scale else 1.0)
