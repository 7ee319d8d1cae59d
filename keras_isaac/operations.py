"""The conditioned operations: a layer's product with a kernel gradient of our own."""

import keras
from keras import ops

from keras_isaac.conditioner import conditioned_gradient


def conditioned_matmul(rows, kernel, damping):
    """Returns `rows @ kernel`; in the backward pass, the gradient of `kernel` is conditioned.

    The gradient with respect to `rows` is the usual one.

    Args:
        rows: tensor `[rows, in]`.
        kernel: tensor or variable `[in, out]`.
        damping: scalar tensor.

    Returns:
        Tensor `[rows, out]`.
    """
    return _conditioned_matmul(rows, kernel, damping)


def _gradients(rows, kernel, damping, output_gradient, needs_rows=True):
    rows_gradient = output_gradient @ ops.transpose(kernel) if needs_rows else None
    kernel_gradient = conditioned_gradient(rows, output_gradient, damping)
    return rows_gradient, ops.cast(kernel_gradient, kernel.dtype)


if keras.backend.backend() == "torch":
    # `keras.ops.custom_gradient` would keep what it need not, compute the input gradient of the first layer, which nobody asks
    # for, and turn an exception of the forward pass into a gradient of NaN.
    import torch

    class _ConditionedMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, kernel, damping):
            ctx.save_for_backward(rows, kernel, damping)
            return ops.matmul(rows, kernel)

        @staticmethod
        def backward(ctx, output_gradient):
            return *_gradients(*ctx.saved_tensors, output_gradient, needs_rows=ctx.needs_input_grad[0]), None

    _conditioned_matmul = _ConditionedMatmul.apply
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _conditioned_matmul(rows, kernel, damping):
        # In eager mode `kernel` may still be a variable, which `tf.custom_gradient` would not take for an argument.
        return _custom_matmul(rows, tf.convert_to_tensor(kernel), tf.convert_to_tensor(damping))

    @tf.custom_gradient
    def _custom_matmul(rows, kernel, damping):
        def gradients(output_gradient):
            return *_gradients(rows, kernel, damping, output_gradient), None

        return tf.matmul(rows, kernel), gradients
else:

    @ops.custom_gradient
    def _conditioned_matmul(rows, kernel, damping):
        def gradients(output_gradient):
            return *_gradients(rows, kernel, damping, output_gradient), ops.zeros_like(damping)

        return ops.matmul(rows, kernel), gradients
