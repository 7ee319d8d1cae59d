"""PyTorch: derivatives of conditioned products and kernels, under every transform."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from keras_isaac.curvature.operations import ProductFunctions

# To support the transforms of `torch.func`, `torch.autograd.Function` binds the signature of `forward` in every call. That
# takes as long as the rest of the call, so an ordinary call takes a faster path.


def _with_fast_path(function: Any) -> Callable[..., Any]:
    class FastPath(function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = function.forward(*inputs)
            function.setup_context(ctx, inputs, outputs)
            return outputs

        setup_context = torch.autograd.Function.setup_context

    def apply(*inputs: Any) -> Any:
        try:
            return FastPath.apply(*inputs)
        except RuntimeError as error:
            # The transforms of `torch.func` refuse a `forward` that sets up its context, before it runs.
            if "setup_context" not in str(error):
                raise
            return function.apply(*inputs)

    return apply


def _mapped(tensor: torch.Tensor | None, axis: int | None, size: int) -> torch.Tensor | None:
    """Returns a tensor with the axis that `torch.func.vmap` maps in front."""
    if tensor is None or (axis is None and tensor.ndim == 0):
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(condition: Callable, is_linear: bool, kernel: torch.Tensor, *residuals: Any) -> Any:
        return kernel.view_as(kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.condition, _, _, *residuals = inputs
        ctx.save_for_backward(*residuals)
        ctx.save_for_forward(*residuals)

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[Any, ...]:
        # Read only once: under recomputation, a second read fails.
        residuals = ctx.saved_tensors
        return None, None, ctx.condition(output_gradient, *residuals), *[None] * len(residuals)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, kernel_tangent: torch.Tensor | None, *___: Any) -> torch.Tensor | None:
        return None if kernel_tangent is None else ctx.condition(kernel_tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], condition: Callable, is_linear: bool, *tensors: Any) -> tuple[Any, int]:
        # The kernel is mapped even if only the rows are: each mapped call conditions a gradient of its own.
        mapped = [_mapped(tensor, axis, info.batch_size) for tensor, axis in zip(tensors, axes[2:], strict=True)]
        if not is_linear:
            in_dims = tuple(None if tensor is None or tensor.ndim == 0 else 0 for tensor in mapped)
            condition = torch.func.vmap(condition, in_dims=in_dims)
        return _gate(condition, is_linear, *mapped), 0


_gate = _with_fast_path(_Gate)


def gate(kernel: torch.Tensor, residuals: Sequence[Any], condition: Callable, is_linear: bool = True) -> torch.Tensor:
    """Returns `kernel`, whose gradient passes `condition`, and so does its tangent if that is a symmetric linear map."""
    return _gate(condition, is_linear, kernel, *residuals)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(functions: "ProductFunctions", rows: torch.Tensor, kernel: torch.Tensor, *residuals: Any) -> Any:
        return rows @ kernel

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.functions, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[Any, ...]:
        rows, kernel, *residuals = ctx.saved_tensors
        rows_gradient = kernel_gradient = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():
                # The gradient that reaches the kernel through the input gradient is conditioned too.
                kernel = ctx.functions.gate(kernel, rows, *residuals)
            rows_gradient = output_gradient @ kernel.mT
        if ctx.needs_input_grad[2]:
            kernel_gradient = ctx.functions.condition(rows, output_gradient, *residuals)
        return None, rows_gradient, kernel_gradient, *[None] * len(residuals)

    @staticmethod
    def jvp(
        ctx: Any, _: Any, rows_tangent: torch.Tensor | None, kernel_tangent: torch.Tensor | None, *__: Any
    ) -> torch.Tensor | None:
        rows, kernel, *residuals = ctx.saved_tensors
        parts = []
        if rows_tangent is not None:
            parts.append(rows_tangent @ ctx.functions.gate(kernel, rows, *residuals))
        if kernel_tangent is not None:
            parts.append(ctx.functions.tangent(rows, kernel_tangent, *residuals).to(rows.dtype))
        return functools.reduce(torch.add, parts) if parts else None


_product = _with_fast_path(_Product)


def product(rows: torch.Tensor, kernel: torch.Tensor, residuals: Sequence[Any], functions: "ProductFunctions") -> torch.Tensor:
    """Returns `rows @ kernel`, whose kernel's tangent and gradient are conditioned."""
    return _product(functions, rows, kernel, *residuals)


class _WithGradients(torch.autograd.Function):
    # `keras.ops.custom_gradient` would compute the input gradient of the first layer, which is not needed, and turn an
    # exception of the forward pass into a gradient of NaN.
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable, gradients: Callable, *tensors: Any) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        _, ctx.gradients, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Any, ...]:
        output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
        return None, None, *ctx.gradients(output_gradients, *ctx.saved_tensors)


_with_gradients = _with_fast_path(_WithGradients)


def with_gradients(function: Callable, gradients: Callable, *tensors: Any) -> Any:
    """Returns `function(*tensors)`, with `gradients(output_gradients, *tensors)` for its gradients."""
    return _with_gradients(function, gradients, *tensors)
