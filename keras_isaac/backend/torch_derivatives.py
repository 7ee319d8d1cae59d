"""PyTorch: derivatives of conditioned products and kernels, under every transform."""

import functools

import torch

# `torch.autograd.Function` binds the signature of `forward` in every call, if it is to work under the transforms of
# `torch.func`. That takes as long as the rest of it, so that the ordinary call goes another way.


def _with_fast_path(function):
    class FastPath(function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = function.forward(*inputs)
            function.setup_context(ctx, inputs, outputs)
            return outputs

        setup_context = torch.autograd.Function.setup_context

    def apply(*inputs):
        try:
            return FastPath.apply(*inputs)
        except RuntimeError as error:
            # The transforms of `torch.func` refuse a `forward` that sets up its context, before it runs.
            if "setup_context" not in str(error):
                raise
            return function.apply(*inputs)

    return apply


def _mapped(tensor, axis, size):
    """Returns a tensor with the axis that `torch.func.vmap` maps in front."""
    if tensor is None or (axis is None and tensor.ndim == 0):
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


@_with_fast_path
class _gate(torch.autograd.Function):  # noqa: N801 (a function to whoever calls it)
    @staticmethod
    def forward(condition, is_linear, kernel, *residuals):
        return kernel.view_as(kernel)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.condition, _, _, *residuals = inputs
        ctx.save_for_backward(*residuals)
        ctx.save_for_forward(*residuals)

    @staticmethod
    def backward(ctx, output_gradient):
        # Read once: recomputation does not give them a second time.
        residuals = ctx.saved_tensors
        return None, None, ctx.condition(output_gradient, *residuals), *[None] * len(residuals)

    @staticmethod
    def jvp(ctx, _, __, kernel_tangent, *___):
        return None if kernel_tangent is None else ctx.condition(kernel_tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, axes, condition, is_linear, *tensors):
        # The kernel is mapped where only the rows are: each has a gradient of its own to condition.
        tensors = [_mapped(tensor, axis, info.batch_size) for tensor, axis in zip(tensors, axes[2:], strict=True)]
        if not is_linear:
            axes = [None if tensor is None or tensor.ndim == 0 else 0 for tensor in tensors]
            condition = torch.func.vmap(condition, in_dims=tuple(axes))
        return _gate(condition, is_linear, *tensors), 0


def gate(kernel, residuals, condition, is_linear=True):
    """Returns `kernel`, whose gradient passes `condition`, and so does its tangent if that is a symmetric linear map."""
    return _gate(condition, is_linear, kernel, *residuals)


@_with_fast_path
class _product(torch.autograd.Function):  # noqa: N801
    generate_vmap_rule = True

    @staticmethod
    def forward(functions, rows, kernel, *residuals):
        return rows @ kernel

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.functions, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, output_gradient):
        rows, kernel, *residuals = ctx.saved_tensors
        rows_gradient = kernel_gradient = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():
                # What reaches the kernel through the derivative of the inputs is conditioned too.
                kernel = ctx.functions.gate(kernel, rows, *residuals)
            rows_gradient = output_gradient @ kernel.mT
        if ctx.needs_input_grad[2]:
            kernel_gradient = ctx.functions.condition(rows, output_gradient, *residuals)
        return None, rows_gradient, kernel_gradient, *[None] * len(residuals)

    @staticmethod
    def jvp(ctx, _, rows_tangent, kernel_tangent, *__):
        rows, kernel, *residuals = ctx.saved_tensors
        parts = []
        if rows_tangent is not None:
            parts.append(rows_tangent @ ctx.functions.gate(kernel, rows, *residuals))
        if kernel_tangent is not None:
            parts.append(ctx.functions.tangent(rows, kernel_tangent, *residuals).to(rows.dtype))
        return functools.reduce(torch.add, parts) if parts else None


def product(rows, kernel, residuals, functions):
    """Returns `rows @ kernel`, whose kernel's tangent and gradient are conditioned."""
    return _product(functions, rows, kernel, *residuals)


@_with_fast_path
class _with_gradients(torch.autograd.Function):  # noqa: N801
    # `keras.ops.custom_gradient` would compute the input gradient of the first layer, which nobody asks for, and turn an
    # exception of the forward pass into a gradient of NaN.
    generate_vmap_rule = True

    @staticmethod
    def forward(function, gradients, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, ctx.gradients, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *output_gradients):
        output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
        return None, None, *ctx.gradients(output_gradients, *ctx.saved_tensors)


def with_gradients(function, gradients, *tensors):
    """Returns `function(*tensors)`, with `gradients(output_gradients, *tensors)` for its gradients."""
    return _with_gradients(function, gradients, *tensors)
