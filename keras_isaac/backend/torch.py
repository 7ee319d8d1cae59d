"""PyTorch: derivatives under every transform, and an inverse that neither raises nor waits for a device."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from keras_isaac.backend.precision import parts_of, product_of_parts

if TYPE_CHECKING:
    from keras_isaac.curvature.operations import ProductFunctions

IS_STATELESS = False
# Of traces and dampings: numbers where reading them does not wait for a device.
Number: TypeAlias = float | torch.Tensor
_TINY = 1e-37  # Stands in for a damping and a matrix that are both zero in float32.
_HOST = "cpu"  # The device whose values are read without waiting.
# Sizes for which comparing a matrix with the last one costs far less than inverting it, and which are not too large to keep.
_SHARED = range(128, 1025)
_last: tuple[torch.Tensor, torch.Tensor | None] = torch.empty(0, 0), None

# Keras would copy each number to the device, and wait for it.
clip = torch.clamp
# Of real matrices.
transpose = torch.adjoint


@functools.lru_cache(maxsize=256)
def _on_device(function: Callable, arguments: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(function(*arguments)).to(device)


def constant(function: Callable, *arguments: Any) -> torch.Tensor:
    """Returns a tensor of the NumPy array `function(*arguments)`, computed and copied to Keras' device once."""
    import keras

    device = keras.ops.zeros(()).device
    if torch.compiler.is_compiling():
        # `torch.compile` traces NumPy, and no cache.
        return torch.from_numpy(function(*arguments)).to(device)
    return _on_device(function, arguments, device)


def segment_sum(values: torch.Tensor, segments: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Returns the sums of the values of each segment, `[num_segments]`; that of Keras reads the segments on the host."""
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add(0, segments, values)


@torch.compiler.assume_constant_result
def _precision() -> str:
    return torch.get_float32_matmul_precision()


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns `a @ b` in full precision, whatever `torch.set_float32_matmul_precision` says."""
    if a.dtype != torch.float32 or _precision() == "highest":
        return a @ b
    return product_of_parts(parts_of(a, _truncate), parts_of(b, _truncate), torch.matmul, torch.cat)


def _truncate(tensor: torch.Tensor, mask: int) -> torch.Tensor:
    return (tensor.view(torch.int32) & mask).view(torch.float32)


def damped_gram(
    rows: torch.Tensor, damping: Any, count: Number, is_relative: bool, is_root: bool = False
) -> tuple[torch.Tensor, Number, Number]:
    """Returns λI + M for M = XXᵀ of rows X `[..., r, n]`, tr(M), and λ."""
    rows = rows.detach()
    size = rows.shape[-2]
    floor = (4 if is_root else 1 / max(size, 1)) * torch.finfo(rows.dtype).eps
    if _is_read(rows):
        # Eager PyTorch pays for every operation on a tensor, so these are numbers, and one operation does the rest.
        norm, damping, count = torch.linalg.vector_norm(rows).item(), float(damping), float(count)
        total = math.inf if norm * norm > torch.finfo(rows.dtype).max else norm * norm
        damping = min(max(damping * total / count if is_relative else damping * count, _TINY), 1 / _TINY)
        in_force = max(damping, floor * total + _TINY)
        return torch.addmm(_identity(size, rows.dtype), rows, rows.mT, beta=in_force), total, damping
    matrix = matmul(rows, rows.mT)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    totals = diagonal.sum(-1)[..., None, None]
    damping = (damping * totals / count).clamp(_TINY, 1 / _TINY) if is_relative else damping * count
    diagonal.add_(torch.maximum(floor * totals + _TINY, damping)[..., 0])
    return matrix, totals, damping


def _is_read(rows: torch.Tensor) -> bool:
    """Whether the values of this matrix can be read, and products are in full precision."""
    if rows.device.type != _HOST or rows.ndim != 2 or rows.numel() == 0 or torch.compiler.is_compiling():
        return False
    try:
        rows.data_ptr()
    except RuntimeError:
        # Under a transform of `torch.func` there is no value to read.
        return False
    return torch.get_float32_matmul_precision() == "highest"


@functools.lru_cache(maxsize=32)
def _identity(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(size, dtype=dtype)


def damped_projection(
    damped: torch.Tensor, total: Number, damping: Number, factor: torch.Tensor
) -> tuple[torch.Tensor, bool | torch.Tensor]:
    """Returns λ (λI + M)⁻¹ F for a factor `[..., r, m]`, and whether the bound replaces the inverse."""
    if damped.shape[-1] == 0:
        return factor, False
    if isinstance(total, float) and (inverse := _inverse(damped)) is not None:
        return (damping * inverse) @ factor, False
    root, failed = _cholesky(damped, total)
    if damped.device.type == _HOST:
        projected = matmul(torch.cholesky_inverse(root), factor)
    else:
        # Solving takes fewer kernel launches than an inverse and a product with it.
        projected = torch.cholesky_solve(factor, root)
    return torch.where(failed, damping / (damping + total) * factor, damping * projected), failed


def _inverse(damped: torch.Tensor) -> torch.Tensor | None:
    """Returns the inverse, or `None` if there is none. Layers that share their input, as query, key and value do, share it."""
    global _last
    last, inverse = _last
    if damped.shape == last.shape and damped.dtype == last.dtype and torch.equal(damped, last):
        return inverse
    root, failed_at = torch.linalg.cholesky_ex(damped)
    inverse = None if failed_at.item() else torch.cholesky_inverse(root)
    if damped.shape[-1] in _SHARED:
        _last = damped, inverse
    return inverse


def damped_inverse_root(
    damped: torch.Tensor, total: Number, damping: Number, rows: torch.Tensor
) -> tuple[torch.Tensor, bool | torch.Tensor]:
    """Returns RX with RᵀR = (λI + M)⁻¹ for rows `[..., r, n]`, and whether the bound replaces R."""
    if damped.shape[-1] == 0:
        return rows, False
    root, failed = _cholesky(damped, total)
    # Solves with the factor directly, which saves a product.
    whitened = torch.linalg.solve_triangular(root, rows, upper=False)
    if failed is not False:
        whitened = torch.where(failed, rows / (damping + total) ** 0.5, whitened)
    return whitened.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), failed


def _cholesky(damped: torch.Tensor, total: Number) -> tuple[torch.Tensor, Any]:
    """Returns the Cholesky factor, or an invertible matrix if it fails, and whether it failed, as `[..., 1, 1]`."""
    # The `_ex` form neither raises nor waits for the device.
    root, failed_at = torch.linalg.cholesky_ex(damped)
    if isinstance(total, float) and not failed_at.item():
        return root, False
    failed = (failed_at > 0)[..., None, None]
    # An inverse from a factor with a zero on its diagonal raises on a CPU.
    return root.masked_fill(failed, 1.0), failed


# Derivatives. To support the transforms of `torch.func`, `torch.autograd.Function` binds the signature of `forward` in every
# call. That takes as long as the rest of the call, so an ordinary call takes a faster path.


class _Function(torch.autograd.Function):
    """`compute(*tensors)`, with derivatives that are made of `rule` and the tensors."""

    @staticmethod
    def forward(compute: Callable, rule: Any, *tensors: Any) -> Any:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        _, ctx.rule, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


def _with_fast_path(function: type[_Function]) -> Callable[..., Any]:
    class FastPath(function):  # type: ignore[valid-type, misc]
        @staticmethod
        def forward(ctx: Any, compute: Callable, rule: Any, *tensors: Any) -> Any:
            ctx.rule = rule
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            return compute(*tensors)

        setup_context = torch.autograd.Function.setup_context

    class Compiled(torch.autograd.Function):
        # `torch.compile` traces no function that has a `jvp`.
        forward = FastPath.forward
        backward = function.backward

    def apply(compute: Callable, rule: Any, *tensors: Any) -> Any:
        if torch.compiler.is_compiling():
            return Compiled.apply(compute, rule, *tensors)
        try:
            return FastPath.apply(compute, rule, *tensors)
        except RuntimeError as error:
            # The transforms of `torch.func` refuse a `forward` that sets up its context, before it runs.
            if "setup_context" not in str(error):
                raise
            return function.apply(compute, rule, *tensors)

    return apply


def _mapped(tensor: torch.Tensor, axis: int | None, size: int) -> torch.Tensor:
    """Returns a tensor with the axis that `torch.func.vmap` maps in front."""
    if axis is None and tensor.ndim == 0:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


class _Gate(_Function):
    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[Any, ...]:
        condition, _ = ctx.rule
        # Read only once: under recomputation, a second read fails.
        _, *residuals = ctx.saved_tensors
        return None, None, condition(output_gradient, *residuals), *[None] * len(residuals)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, kernel_tangent: torch.Tensor | None, *___: Any) -> torch.Tensor | None:
        return None if kernel_tangent is None else ctx.rule[0](kernel_tangent, *ctx.saved_tensors[1:])

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], compute: Callable, rule: Any, *tensors: Any) -> tuple[Any, int]:
        # The kernel is mapped even if only the rows are: each mapped call conditions a gradient of its own.
        mapped = [_mapped(tensor, axis, info.batch_size) for tensor, axis in zip(tensors, axes[2:], strict=True)]
        condition, is_linear = rule
        if not is_linear:
            in_dims = tuple(0 if tensor.ndim else None for tensor in mapped)
            condition = torch.func.vmap(condition, in_dims=in_dims)
        return _gate(compute, (condition, is_linear), *mapped), 0


_gate = _with_fast_path(_Gate)


def gate(kernel: torch.Tensor, residuals: Sequence[Any], condition: Callable, is_linear: bool = True) -> torch.Tensor:
    """Returns `kernel`, whose gradient passes `condition`, and so does its tangent if that is a symmetric linear map."""
    return _gate(lambda kernel, *_: kernel.view_as(kernel), (condition, is_linear), kernel, *residuals)


class _Product(_Function):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[Any, ...]:
        rows, kernel, *residuals = ctx.saved_tensors
        rows_gradient = kernel_gradient = None
        if ctx.needs_input_grad[2]:
            if torch.is_grad_enabled():
                # The gradient that reaches the kernel through the input gradient is conditioned too.
                kernel = ctx.rule.gate(kernel, rows, *residuals)
            rows_gradient = output_gradient @ kernel.mT
        if ctx.needs_input_grad[3]:
            kernel_gradient = ctx.rule.condition(rows, output_gradient, *residuals)
        return None, None, rows_gradient, kernel_gradient, *[None] * len(residuals)

    @staticmethod
    def jvp(
        ctx: Any, _: Any, __: Any, rows_tangent: torch.Tensor | None, kernel_tangent: torch.Tensor | None, *___: Any
    ) -> torch.Tensor | None:
        rows, kernel, *residuals = ctx.saved_tensors
        parts = []
        if rows_tangent is not None:
            parts.append(rows_tangent @ ctx.rule.gate(kernel, rows, *residuals))
        if kernel_tangent is not None:
            parts.append(ctx.rule.tangent(rows, kernel_tangent, *residuals).to(rows.dtype))
        return functools.reduce(torch.add, parts) if parts else None


_product = _with_fast_path(_Product)


def product(rows: torch.Tensor, kernel: torch.Tensor, residuals: Sequence[Any], functions: "ProductFunctions") -> torch.Tensor:
    """Returns `rows @ kernel`, whose kernel's tangent and gradient are conditioned."""
    return _product(lambda rows, kernel, *_: rows @ kernel, functions, rows, kernel, *residuals)


class _WithGradients(_Function):
    # `keras.ops.custom_gradient` would compute the input gradient of the first layer, which is not needed, and turn an
    # exception of the forward pass into a gradient of NaN.
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Any, ...]:
        output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
        return None, None, *ctx.rule(output_gradients, *ctx.saved_tensors)


with_gradients = _with_fast_path(_WithGradients)


def gradients_of(function: Callable, tensors: Sequence[torch.Tensor]) -> tuple[Any, Sequence[torch.Tensor]]:
    """Returns the second result of `function`, and the gradients of its first, a loss."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    # Dropout without a seed draws from PyTorch's own generator, whose state is restored.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        loss, results = function(tensors)
        return results, torch.autograd.grad(loss, tensors, materialize_grads=True)


# State.


def is_tracing(tensor: Any) -> bool:
    """Whether Python runs for the step that computes with `tensor`."""
    return True


def compiled(function: Callable) -> Callable:
    """Returns `function`: it runs eagerly."""
    return function


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
