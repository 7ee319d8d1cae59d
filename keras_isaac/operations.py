"""The conditioned operations: custom gradients, in which the backends differ."""

import keras
from keras import ops

from keras_isaac.conditioner import condition, conditioned_gradient


def conditioned_matmul(rows, kernel, damping, max_rows=None):
    """Returns `rows @ kernel`; in the backward pass, the gradient of `kernel` is conditioned on `rows`.

    The gradient with respect to `rows` is the usual one. Where only the finished gradient can be conditioned, as for a
    convolution, see `conditioned_kernel`; here the output's gradient is at hand too, and with few rows this is cheaper.

    Args:
        rows: tensor `[..., rows, in]`.
        kernel: tensor or variable `[..., in, out]`.
        damping: scalar tensor.
        max_rows: integer, how many rows at most stand for all, or `None`.

    Returns:
        Tensor `[..., rows, out]`.
    """

    def gradients(output_gradient, needed, rows, kernel, damping):
        rows_gradient = kernel_gradient = None
        if needed[0]:
            rows_gradient = output_gradient @ ops.swapaxes(kernel, -2, -1)
        if needed[1]:
            kernel_gradient = conditioned_gradient(rows, output_gradient, damping, max_rows)
            kernel_gradient = ops.cast(kernel_gradient, kernel.dtype)
        return rows_gradient, kernel_gradient, None

    return _with_gradients(lambda rows, kernel, _: ops.matmul(rows, kernel), gradients, rows, kernel, damping)


def conditioned_kernel(kernel, rows, damping, num_rows=None):
    """Returns `kernel`; in the backward pass, its gradient is conditioned on `rows`.

    Args:
        kernel: tensor `[..., in, out]`.
        rows: tensor `[..., rows, in]`, the rows that stand for the layer's inputs; no gradient flows into them.
        damping: scalar tensor.
        num_rows: scalar tensor, how many of the rows count, where others are zero. Defaults to `None`: all count.

    Returns:
        Tensor `[..., in, out]`.
    """
    rows = ops.stop_gradient(rows)
    optional = () if num_rows is None else (ops.stop_gradient(num_rows),)

    def gradients(kernel_gradient, needed, kernel, rows, damping, *optional):
        conditioned = condition(kernel_gradient, rows, damping, *optional)
        return (ops.cast(conditioned, kernel.dtype), None, None, *(None for _ in optional))

    return _with_gradients(lambda kernel, *_: kernel, gradients, kernel, rows, damping, *optional)


def scaled_gradient(tensor, scale):
    """Returns `tensor`; in the backward pass, its gradient is multiplied by `scale`, of a shape that broadcasts to it."""

    def gradients(output_gradient, needed, tensor, scale):
        return ops.cast(output_gradient * ops.cast(scale, output_gradient.dtype), tensor.dtype), None

    return _with_gradients(lambda tensor, scale: tensor, gradients, tensor, ops.stop_gradient(scale))


if keras.backend.backend() == "torch":
    # `keras.ops.custom_gradient` would compute the input gradient of the first layer, which nobody asks for, and turn an
    # exception of the forward pass into a gradient of NaN.
    import torch

    class _WithGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, gradients, *tensors):
            ctx.gradients = gradients
            ctx.save_for_backward(*tensors)
            return function(*tensors)

        @staticmethod
        def backward(ctx, output_gradient):
            return None, None, *ctx.gradients(output_gradient, ctx.needs_input_grad[2:], *ctx.saved_tensors)

    def _with_gradients(function, gradients, *tensors):
        """Returns `function(*tensors)`, with `gradients(output_gradient, needed, *tensors)` for its gradients."""
        return _WithGradients.apply(function, gradients, *(ops.convert_to_tensor(tensor) for tensor in tensors))
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _with_gradients(function, gradients, *tensors):
        """Returns `function(*tensors)`, with `gradients(output_gradient, needed, *tensors)` for its gradients."""

        @tf.custom_gradient
        def call(*tensors):
            return function(*tensors), lambda gradient: gradients(gradient, [True] * len(tensors), *tensors)

        # In eager mode a tensor may still be a variable, which `tf.custom_gradient` would not take for an argument.
        return call(*(tf.convert_to_tensor(tensor) for tensor in tensors))
else:

    def _with_gradients(function, gradients, *tensors):
        """Returns `function(*tensors)`, with `gradients(output_gradient, needed, *tensors)` for its gradients."""

        @ops.custom_gradient
        def call(*tensors):
            def all_gradients(gradient):
                results = gradients(gradient, [True] * len(tensors), *tensors)
                return tuple(ops.zeros_like(t) if r is None else r for t, r in zip(tensors, results, strict=True))

            return function(*tensors), all_gradients

        return call(*tensors)
