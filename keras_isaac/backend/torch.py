"""PyTorch: an inverse that neither raises nor waits for a device."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from keras_isaac.backend.precision import parts_of, product_of_parts
from keras_isaac.backend.torch_derivatives import gate, product, with_gradients  # noqa: F401 (a part of the interface)

if TYPE_CHECKING:
    import keras
    import numpy as np

IS_STATELESS = False
TENSORS_TAKE_ATTRIBUTES = True
# Of traces and dampings: numbers where reading them does not wait for a device.
Number: TypeAlias = float | torch.Tensor
_TINY = 1e-37  # Stands in for a damping and a matrix that are both zero in float32.
# Sizes for which comparing a matrix with the last one costs far less than inverting it, and which are not too large to keep.
_SHARED = range(128, 1025)
_last: tuple[torch.Tensor, torch.Tensor | None] = torch.empty(0, 0), None


@functools.lru_cache(maxsize=256)
def _on_device(data: bytes, shape: tuple[int, ...], dtype: str, device: torch.device) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy()).to(device)


def constant(array: "np.ndarray") -> torch.Tensor:
    """Returns a tensor of a NumPy array on Keras' device, where it is copied once."""
    import keras

    device = keras.ops.zeros(()).device
    return _on_device(array.tobytes(), array.shape, array.dtype.str, device)


# Keras would copy each number to the device, and wait for it.
clip = torch.clamp


# Keras' own functions are slower than these.


def stop_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor`, through which no gradient flows."""
    return tensor.detach()


def is_tracing(tensor: Any) -> bool:
    """Whether Python runs for the step that computes with `tensor`."""
    return True


# The scopes that are open in any thread: PyTorch runs backward passes on a GPU in threads of its own.
_scopes_of_process: dict[object, tuple] = {}


def in_scopes(scopes: tuple[Any, ...]) -> contextlib.AbstractContextManager:
    """Opens the context by which `scopes_of_recomputation` finds the scopes, and returns what closes it."""
    closing = contextlib.ExitStack()
    if not torch.compiler.is_compiling():
        key = object()
        _scopes_of_process[key] = scopes
        closing.callback(_scopes_of_process.pop, key)
    return closing


def scopes_of_recomputation() -> tuple[Any, ...] | None:
    """Returns the scopes of the forward pass that is recomputed here, `None` if they are closed, and nothing elsewhere."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return ()
    # PyTorch does not tell which forward pass is recomputed, so these are the scopes that were opened last.
    return next(reversed(_scopes_of_process.values()), None)


def untraced(function: Callable) -> None:
    """Returns `None`: no function of a layer keeps a trace of another scope."""
    return None


def traced_once(function: Callable) -> Callable:
    """Returns `function`: nothing is traced."""
    return function


def transpose(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a matrix `[..., m, n]` transposed."""
    return matrix.mT


def segment_sum(values: torch.Tensor, segments: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Returns the sums of the values of each segment, `[num_segments]`; that of Keras reads the segments on the host."""
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add(0, segments, values)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns `a @ b` in full precision, whatever `torch.set_float32_matmul_precision` says."""
    if a.dtype != torch.float32 or not _rounds_products():
        return a @ b
    return product_of_parts(parts_of(a, _truncate), parts_of(b, _truncate), torch.matmul, torch.cat)


def _rounds_products() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def _truncate(tensor: torch.Tensor, mask: int) -> torch.Tensor:
    return (tensor.view(torch.int32) & mask).view(torch.float32)


def trace(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the diagonal of `[..., k, k]`, as `[..., 1, 1]`."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def trace_of_gram(rows: torch.Tensor, gram: torch.Tensor) -> Number:
    """Returns tr(XXᵀ) of rows `[..., r, n]`, given XXᵀ or XᵀX, as a number or as `[..., 1, 1]`."""
    return gram.trace().item() if is_in_numbers(gram) else trace(gram)


def is_in_numbers(matrix: torch.Tensor) -> bool:
    """Whether traces and dampings are read as numbers: eager PyTorch pays for operations on tensors, and a CPU has no queue."""
    if not is_on_cpu(matrix) or matrix.ndim != 2 or matrix.shape[-1] == 0 or torch.compiler.is_compiling():
        return False
    try:
        matrix.data_ptr()
    except RuntimeError:
        # Under a transform of `torch.func` there is no number to read.
        return False
    return not matrix.requires_grad


def is_on_cpu(matrix: torch.Tensor) -> bool:
    """Whether a matrix can be read without waiting for its device."""
    return matrix.device.type == "cpu"


def relative_damping(damping: Number, total: Number, rank: Number) -> Number:
    """Returns δ tr(M)/rank, above zero."""
    if isinstance(total, float):
        return min(max(float(damping) * total / float(rank), _TINY), 1 / _TINY)
    return (damping * total / rank).clamp(_TINY, 1 / _TINY)


def damped_projection(matrix: torch.Tensor, total: Number, damping: Number, rows: torch.Tensor) -> torch.Tensor:
    """Returns λ (λI + M)⁻¹ X for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    if is_on_cpu(matrix) or matrix.shape[-1] == 0:
        return matmul(damping * damped_inverse(matrix, total, damping), rows)
    # On a GPU, solving takes fewer kernel launches than an inverse and a product with it.
    factor, failed = _factor(matrix, total, damping, 1 / matrix.shape[-1])
    bounded = damping / (damping + total) * rows
    return torch.where(failed, bounded, damping * torch.cholesky_solve(rows, factor))


def eager_projection(rows: torch.Tensor, factor: torch.Tensor, damping: Number, is_relative: bool) -> torch.Tensor | None:
    """Returns P times a factor, P = λ (λI + XXᵀ/r)⁻¹ for rows X `[r, n]`; or `None` where `damped_projection` has to do it.

    On a CPU, where numbers can be read: one product with the damping folded into it, a Cholesky factor and its inverse.
    """
    # The curvature is a constant of the step.
    rows = rows.detach()
    if not is_in_numbers(rows) or _rounds_products() or not rows.shape[0]:
        return None
    num_rows, num_in = rows.shape
    total = torch.linalg.vector_norm(rows).item() ** 2
    damping = float(damping)
    damping = damping * total / min(num_rows, num_in) if is_relative else damping * num_rows
    if not total < 1 / _TINY:
        return None
    damping = min(max(damping, _TINY), 1 / _TINY)
    in_force = max(damping, torch.finfo(rows.dtype).eps / num_rows * total + _TINY)
    damped = torch.addmm(_identity(num_rows, rows.dtype), rows, rows.mT, alpha=1 / in_force)
    factor_of_damped, failed_at = torch.linalg.cholesky_ex(damped)
    if failed_at.item() != 0:
        return None
    projected = torch.cholesky_inverse(factor_of_damped) @ factor
    return projected if in_force == damping else projected * (damping / in_force)


@functools.lru_cache(maxsize=32)
def _identity(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(size, dtype=dtype)


def damped_inverse(matrix: torch.Tensor, total: Number, damping: Number) -> torch.Tensor:
    """Returns (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total`."""
    if matrix.shape[-1] == 0:
        return matrix
    if isinstance(total, float) and (inverse := _inverse_in_numbers(matrix, total, damping)) is not None:
        return inverse
    factor, failed = _factor(matrix, total, damping, 1 / matrix.shape[-1])
    bounded = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) / (damping + total)
    return torch.where(failed, bounded, torch.cholesky_inverse(factor))


def damped_inverse_root(matrix: torch.Tensor, total: Number, damping: Number, rows: torch.Tensor) -> torch.Tensor:
    """Returns RF with RᵀR = (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    if matrix.shape[-1] == 0:
        return rows
    factor = None
    if isinstance(total, float):
        factor = _factor_if_definite(_damped(matrix, total, damping, 4))
    if factor is None:
        factor, failed = _factor(matrix, total, damping, 4)
        whitened = torch.where(failed, rows / (damping + total) ** 0.5, _whitened(factor, rows))
    else:
        whitened = _whitened(factor, rows)
    return whitened.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def is_indefinite(matrix: torch.Tensor, total: Number, damping: Number, is_root: bool = False) -> torch.Tensor:
    """Returns for each matrix `[..., k, k]` whether a bound replaces its inverse, as `[...]`."""
    if matrix.shape[-1] == 0:
        return torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    return _factor(matrix, total, damping, 4 if is_root else 1 / matrix.shape[-1])[1][..., 0, 0]


def _damped(matrix: torch.Tensor, total: Number, damping: Any, floor: float) -> torch.Tensor:
    """Returns λI + M for a λ of at least `floor` times the trace's epsilon."""
    epsilon = floor * torch.finfo(matrix.dtype).eps
    if isinstance(total, float):
        in_force: Any = max(float(damping), epsilon * total + _TINY)
    else:
        in_force = torch.maximum(epsilon * total + _TINY, damping)[..., 0]
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(in_force)
    return damped


def _factor(matrix: torch.Tensor, total: Number, damping: Number, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the Cholesky factor of λI + M, or an invertible matrix if it fails, and whether it failed, as `[..., 1, 1]`."""
    # The `_ex` form neither raises nor waits for the device.
    factor, failed_at = torch.linalg.cholesky_ex(_damped(matrix, total, damping, floor))
    failed = (failed_at > 0)[..., None, None]
    # An inverse from a factor with a zero on its diagonal raises on a CPU.
    return factor.masked_fill(failed, 1.0), failed


def _whitened(factor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # Solves with the factor directly, which saves a product.
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _factor_if_definite(matrix: torch.Tensor) -> torch.Tensor | None:
    factor, failed_at = torch.linalg.cholesky_ex(matrix)
    return factor if failed_at.item() == 0 else None


def _inverse_in_numbers(matrix: torch.Tensor, total: Number, damping: Number) -> torch.Tensor | None:
    """Returns the inverse, or `None`. Layers that share their input, as query, key and value do, share its inverse."""
    global _last
    damped = _damped(matrix, total, damping, 1 / matrix.shape[-1])
    last_matrix, last_inverse = _last
    if damped.shape == last_matrix.shape and damped.dtype == last_matrix.dtype and torch.equal(damped, last_matrix):
        return last_inverse
    factor = _factor_if_definite(damped)
    inverse = None if factor is None else torch.cholesky_inverse(factor)
    if damped.shape[-1] in _SHARED:
        _last = damped, inverse
    return inverse


def gradients_of(function: Callable, tensors: Sequence[torch.Tensor]) -> tuple[Any, Sequence[torch.Tensor]]:
    """Returns the second result of `function`, and the gradients of its first, a loss."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    # Dropout without a seed draws from PyTorch's own generator, whose state is restored.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        loss, results = function(tensors)
        return results, torch.autograd.grad(loss, tensors, materialize_grads=True)


# No variable is read after its update.
barrier = list


def compiled(measure: Callable, variables: "Sequence[keras.Variable]") -> Callable[[Any], Any]:
    """Returns `measure(data, values)` as a function of the data, with the present values of the variables."""
    return lambda data: measure(data, [variable.value for variable in variables]).detach()
