"""The conditioned operations: custom gradients, in which the backends differ."""

import keras
from keras import ops

from keras_isaac.conditioner import condition, condition_outputs, conditioned_gradient, with_norm_of
from keras_isaac.replicas import mean_over_replicas


def conditioned_matmul(rows, kernel, conditioning, max_rows=None):
    """Returns `rows @ kernel`; in the backward pass, the gradient of `kernel` is conditioned on `rows`.

    The gradient with respect to `rows` is the usual one. Where only the finished gradient can be conditioned, as for a
    convolution, see `conditioned_kernel`; here the output's gradient is at hand too, and with few rows this is cheaper.

    Args:
        rows: tensor `[..., rows, in]`.
        kernel: tensor or variable `[..., in, out]`.
        conditioning: the `Conditioning` in force.
        max_rows: integer, how many rows at most stand for all, or `None`.

    Returns:
        Tensor `[..., rows, out]`.
    """

    def gradients(output_gradient, needed, rows, kernel, damping, output_damping):
        rows_gradient = kernel_gradient = None
        if needed[0]:
            rows_gradient = output_gradient @ ops.swapaxes(kernel, -2, -1)
        if needed[1]:

            def conditioned(rows, output_gradient):
                options = {"max_rows": max_rows, **conditioning.options}
                return conditioned_gradient(rows, output_gradient, damping, output_damping, **options)

            if conditioning.per_replica:
                kernel_gradient = mean_over_replicas(conditioned, rows, output_gradient)
            else:
                kernel_gradient = conditioned(rows, output_gradient)
            kernel_gradient = _cast(kernel_gradient, kernel.dtype)
        return rows_gradient, kernel_gradient, None, None

    dampings = (conditioning.damping, conditioning.output_damping)
    return _with_gradients(lambda rows, kernel, *_: rows @ kernel, gradients, rows, kernel, *dampings)


def conditioned_kernel(kernel, rows, conditioning, num_rows=None):
    """Returns `kernel`; in the backward pass, its gradient is conditioned on `rows`.

    Args:
        kernel: tensor `[..., in, out]`.
        rows: tensor `[..., rows, in]`, the rows that stand for the layer's inputs; no gradient flows into them.
        conditioning: the `Conditioning` in force.
        num_rows: scalar tensor, how many of the rows count, where others are zero. Defaults to `None`: all count.

    Returns:
        Tensor `[..., in, out]`.
    """

    def gradients(kernel_gradient, needed, kernel, rows, damping, num_rows):
        conditioned = condition(kernel_gradient, rows, damping, num_rows, **conditioning.options)
        return _cast(conditioned, kernel.dtype), None, None, None

    tensors = (kernel, ops.stop_gradient(rows), conditioning.damping, num_rows)
    return _with_gradients(lambda kernel, *_: kernel, gradients, *tensors)


def output_conditioned_kernel(kernel, carrier, damping, num_rows=None, **options):
    """Returns `kernel` and `carrier`; in the backward pass, the kernel's gradient is conditioned on the carrier's.

    `carried` sends rows of the output's gradient there.

    Args:
        kernel: tensor `[..., in, out]`.
        carrier: tensor of zeros `[..., rows, out]`.
        damping: scalar tensor, as it stands beside the gradients of a mean loss.
        num_rows: scalar tensor, how many of the rows count, where others are zero. Defaults to `None`: all count.
        **options: of the conditioner.

    Returns:
        Tensors `[..., in, out]` and `[..., rows, out]`.
    """

    def gradients(output_gradients, needed, kernel, carrier, damping, num_rows):
        kernel_gradient, output_rows = output_gradients
        conditioned = condition_outputs(kernel_gradient, output_rows, damping, num_rows, **options)
        return _cast(conditioned, kernel.dtype), None, None, None

    return _with_gradients(lambda kernel, carrier, *_: (kernel, carrier), gradients, kernel, carrier, damping, num_rows)


def carried(outputs, carrier, rows_of):
    """Returns `outputs`; in the backward pass, `rows_of` of their gradient is the gradient of `carrier`."""

    def gradients(output_gradient, needed, outputs, carrier):
        return output_gradient, _cast(rows_of(output_gradient), carrier.dtype)

    return _with_gradients(lambda outputs, _: outputs, gradients, outputs, carrier)


def scaled_gradient(tensor, scale, preserve_norm=False):
    """Returns `tensor`; in the backward pass, its gradient is multiplied by `scale`.

    Args:
        tensor: tensor.
        scale: tensor, of a shape that broadcasts to it.
        preserve_norm: boolean, whether the product is scaled back to the norm of the gradient.

    Returns:
        Tensor, as given.
    """

    def gradients(output_gradient, needed, tensor, scale):
        # As in the conditioner, in float32 or better: a small scale is zero in float16.
        output_gradient = _cast(output_gradient, keras.backend.result_type(output_gradient.dtype, "float32"))
        scaled = output_gradient * ops.cast(scale, output_gradient.dtype)
        return _cast(with_norm_of(output_gradient, scaled) if preserve_norm else scaled, tensor.dtype), None

    return _with_gradients(lambda tensor, scale: tensor, gradients, tensor, ops.stop_gradient(scale))


def _cast(tensor, dtype):
    # Spares eager PyTorch a call.
    return tensor if tensor.dtype == dtype else ops.cast(tensor, dtype)


# Each backend has `_with_gradients(function, gradients, *tensors)`, which returns `function(*tensors)`, with
# `gradients(output_gradient, needed, *tensors)` for its gradients. A tensor may be `None`, and so may a gradient.

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
        def backward(ctx, *output_gradients):
            output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
            return None, None, *ctx.gradients(output_gradients, ctx.needs_input_grad[2:], *ctx.saved_tensors)

    def _with_gradients(function, gradients, *tensors):
        known = (torch.Tensor, type(None))
        tensors = (tensor if isinstance(tensor, known) else ops.convert_to_tensor(tensor) for tensor in tensors)
        return _WithGradients.apply(function, gradients, *tensors)
else:

    def _with_gradients(function, gradients, *tensors):
        given = [tensor is not None for tensor in tensors]

        def completed(present):
            present = iter(present)
            return [next(present) if is_given else None for is_given in given]

        def call(*present):
            def all_gradients(*output_gradients):
                output_gradients = tuple(map(_dense, output_gradients))
                output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
                results = gradients(output_gradients, [True] * len(given), *completed(present))
                results = [result for result, is_given in zip(results, given, strict=True) if is_given]
                return tuple(map(_gradient, results, present))

            return function(*completed(present)), all_gradients

        return _custom_gradient(call)(*(_as_tensor(tensor) for tensor in tensors if tensor is not None))

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        _custom_gradient = tf.custom_gradient
        # In eager mode a tensor may still be a variable, which `tf.custom_gradient` would not take for an argument.
        _as_tensor = tf.convert_to_tensor
        # The gradient of a table comes as a sparse one.
        _dense = tf.convert_to_tensor

        def _gradient(result, tensor):
            return result
    else:
        _custom_gradient = ops.custom_gradient
        _as_tensor = ops.convert_to_tensor

        def _dense(gradient):
            return gradient

        def _gradient(result, tensor):
            return ops.zeros_like(tensor) if result is None else result
