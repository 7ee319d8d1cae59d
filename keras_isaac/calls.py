"""What the adapters of layers share: conditioned products and kernels, a layer's own call with other kernels, masks, biases."""

import math

from keras import ops

from keras_isaac.conditioner import mean_loss_damping
from keras_isaac.keras_hooks import call_with, mask_of  # noqa: F401 (adapters take them from here)
from keras_isaac.operations import carried, conditioned_kernel, conditioned_matmul, output_conditioned_kernel
from keras_isaac.rows import representatives


def as_dense(inputs):
    """Returns a tensor, dense if it was sparse."""
    return ops.convert_to_tensor(inputs, sparse=False)


def conditioned(matrix, conditioning, representatives, is_product=False):
    """Returns the kernel `[(groups,) in, out]` with its gradient conditioned on rows, of which some may not count."""
    rows, num_rows = representatives

    def condition(matrix):
        return conditioned_kernel(matrix, rows, conditioning, num_rows)

    return conditioning.watched(condition, matrix, rows=rows, num_rows=num_rows, is_product=is_product)


def conditioned_by_outputs(matrix, conditioning, output_shape, rows_of=lambda outputs: outputs, mask=None, num_groups=0):
    """Returns the kernel `[(groups,) in, out]`, its gradient conditioned on that of the layer's product too, and a tap.

    The product must pass through the tap, a function. Without a finite output damping, the kernel is as it was.

    Args:
        matrix: tensor, the kernel.
        conditioning: the `Conditioning` in force.
        output_shape: tuple, the shape of the layer's product.
        rows_of: function from the product to `[*groups, samples, *positions, out]`. Defaults to the identity.
        mask: tensor `[samples, *positions]`, true where a position counts, or `None`.
        num_groups: integer, how many leading axes of `rows_of` are groups.
    """
    if conditioning.output_damping is None:
        return matrix, None

    def output_rows(outputs):
        return representatives(ops.cast(rows_of(outputs), matrix.dtype), conditioning, mask, num_groups, summed=True)

    zeros = ops.zeros(output_shape, matrix.dtype)
    carrier, num_rows = output_rows(zeros)
    damping = conditioning.output_damping
    if not conditioning.relative_damping:
        shape = ops.shape(rows_of(zeros))[num_groups:-1]
        total = shape[0] if conditioning.weight_sharing == "reduce" else math.prod(shape)
        if num_rows is not None:
            kept = ops.cast(ops.shape(carrier)[-2], "float32")
            total = ops.maximum(ops.cast(num_rows, "float32"), 1.0) * ops.cast(total, "float32") / kept
        elif not isinstance(total, int):
            total = ops.cast(total, "float32")
        damping = mean_loss_damping(ops.cast(damping, "float32"), total)
    matrix = conditioning.watched(lambda matrix: matrix, matrix, output_rows=carrier)
    matrix, carrier = output_conditioned_kernel(matrix, carrier, damping, num_rows, **conditioning.options)
    return matrix, lambda outputs: carried(outputs, carrier, lambda gradient: output_rows(gradient)[0])


def product(inputs, kernel, conditioning, mask, num_groups=0):
    """Returns `inputs @ kernel`, the kernel conditioned on the positions of the inputs.

    Args:
        inputs: tensor `[(groups,) samples, *positions, in]`.
        kernel: tensor `[(groups,) in, out]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[samples, *positions]`, true where a position counts, or `None`.
        num_groups: 1 if there is an axis of groups, else 0.
    """
    # What `matmul` promotes, the conditioned product is given: sparse inputs dense, integers in the kernel's dtype.
    inputs = ops.cast(as_dense(inputs), kernel.dtype)
    is_matrix, is_watched = len(inputs.shape) == num_groups + 2, conditioning.observe is not None
    is_product = mask is None and (is_matrix or conditioning.weight_sharing == "expand")
    if is_product and is_matrix and not is_watched:
        return conditioned_matmul(inputs, kernel, conditioning)
    shape = ops.shape(inputs)
    rows = ops.reshape(inputs, (*shape[:num_groups], -1, kernel.shape[-2]))
    output_shape = (*shape[:-1], kernel.shape[-1])
    if is_product and not is_watched:
        return ops.reshape(conditioned_matmul(rows, kernel, conditioning, conditioning.max_rows), output_shape)
    kernel = conditioned(kernel, conditioning, representatives(inputs, conditioning, mask, num_groups), is_product)
    kernel, tap = conditioned_by_outputs(kernel, conditioning, output_shape, mask=mask, num_groups=num_groups)
    outputs = ops.reshape(ops.matmul(rows, kernel), output_shape)
    return outputs if tap is None else tap(outputs)


def bias_and_activation(layer, outputs, data_format="channels_last"):
    """Returns `outputs` with the layer's bias added and its activation applied."""
    if layer.bias is not None:
        bias = layer.bias
        if data_format == "channels_first":
            bias = ops.reshape(bias, (1, -1, *(1 for _ in outputs.shape[2:])))
        outputs = ops.add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)
