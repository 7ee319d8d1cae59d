"""What the adapters share: conditioned products and kernels, a layer's own call with other kernels, masks, biases."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_isaac.backend import layout
from keras_isaac.curvature import operations, plan
from keras_isaac.curvature.conditioner import cast
from keras_isaac.curvature.record import SPARSE, KernelCall
from keras_isaac.curvature.rows import Rows, sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, own_call, quantization  # noqa: F401 (adapters take them from here)
from keras_isaac.scope import Conditioning


def as_dense(inputs):
    """Returns a tensor, dense if it was sparse."""
    return ops.convert_to_tensor(inputs, sparse=False)


class Outputs(NamedTuple):
    """A layer's product, as the outputs' side conditions on its gradient.

    Args:
        shape: tuple, the shape of the product.
        rows_of: function from the product to `[*groups, samples, *positions, out]`. Defaults to the identity.
        mask: tensor `[samples, *positions]`, true where a position counts, or `None`.
        num_groups: integer, how many leading axes of `rows_of` are groups.
    """

    shape: tuple
    rows_of: Callable[[Any], Any] = lambda outputs: outputs
    mask: Any = None
    num_groups: int = 0


def conditioned(matrix: Any, conditioning: Conditioning, rows: Rows, outputs: Outputs | None = None) -> Any:
    """Returns the kernel `[(groups,) in, out]` with its gradient conditioned on rows, once it is finished.

    With `outputs`, it returns a carrier too, which the caller adds to the layer's product: `None` without an output damping.

    Args:
        matrix: tensor, the kernel.
        conditioning: the `Conditioning` in force.
        rows: `Rows` that stand for the layer's inputs.
        outputs: `Outputs`, or `None` if only the inputs' side is to be conditioned.
    """
    call = _record(matrix, conditioning, rows, outputs, has_product=False)
    kernel, twin, carrier = _with_twin_and_carrier(matrix, conditioning, outputs)
    kernel = _conditioned_kernel(kernel, twin, conditioning, call)
    return kernel if outputs is None else (kernel, carrier)


def is_sparse(inputs):
    """Returns whether inputs are a sparse tensor: of a backend, where it has `indices`, or of a functional model."""
    indices = getattr(inputs, "indices", None)
    # A dense tensor of PyTorch has a method of this name.
    return getattr(inputs, "sparse", False) is True or (indices is not None and not callable(indices))


def note_sparse(layer, conditionings):
    """Warns, and records with each `Conditioning`, that sparse inputs leave this call of a layer plain.

    Conditioning would need the rows as a dense matrix, which takes many times as long as the sparse product.
    """
    warnings.warn(
        f"{type(layer).__name__} layer '{layer.path}' trains with its plain gradient, because its inputs are sparse. To "
        "condition it, pass dense inputs. To silence this warning, pass the layer to `capture_inputs(..., exclude=)`.",
        stacklevel=2,
    )
    for conditioning in filter(None, conditionings):
        conditioning.note(KernelCall((), reason=SPARSE))


def has_lora(layer):
    """Whether the layer computes by LoRA's factors. Those that Keras quantizes by other modes do not use them."""
    return getattr(layer, "lora_enabled", False) and quantization(layer) in (None, "int8", "int4")


def main_kernels(layer):
    """Returns the kernel of a layer, or LoRA's two factors; of a quantized layer what trains of them."""
    if has_lora(layer):
        return [layer.lora_kernel_a, layer.lora_kernel_b]
    # Float8 multiplies a float kernel, rounded. Other modes have no kernel that trains.
    return [layer.kernel] if quantization(layer) in (None, "float8") else []


def conditioned_factors(kernels, matrices, conditioning_of, rows):
    """Returns the matrices of LoRA's factors, those that train with their gradients conditioned.

    The second factor meets the rows' products with the first, a row for each group and each output of the first.

    Args:
        kernels: the two variables.
        matrices: their tensors, `[(groups,) in, outputs * rank]` and `[rank, out]`; or the second `[groups, rank, out]`, of
            which each group meets as many of the rows, in their order.
        conditioning_of: see the adapters.
        rows: `Rows` `[(groups,) rows, in]` that meet the first.
    """
    (first, second), conditionings = matrices, [conditioning_of(kernel) for kernel in kernels]
    if conditionings[1] is not None:
        second = conditioned(second, conditionings[1], _rows_of_second(rows, first, second))
    if conditionings[0] is not None:
        first = conditioned(first, conditionings[0], rows)
    return first, second


def _rows_of_second(rows, first, second):
    values, first = ops.stop_gradient(rows.values), ops.stop_gradient(first)
    values = ops.cast(values, first.dtype) @ first
    *groups, rank, _ = second.shape
    times = math.prod(values.shape[:-2]) * (values.shape[-1] // rank)
    num_counted, num_represented = rows.num_counted, rows.num_represented
    if num_counted is not None:
        num_counted = ops.reshape(ops.mean(num_counted) * times, (1, 1))
    if num_represented is not None:
        num_represented = num_represented * times // math.prod(groups)
    return Rows(ops.reshape(values, (*groups, -1, rank)), num_counted, num_represented)


def conditioned_table(table, tokens, conditioning, frequency, damping):
    """Returns a table `[vocabulary, features]` with its gradient conditioned on one-hot rows.

    Args:
        table: tensor.
        tokens: integer tensor, those that are looked up.
        conditioning: the `Conditioning` in force.
        frequency: tensor `[vocabulary]`, the share of each token.
        damping: scalar tensor, as it stands beside the shares.
    """
    scale = _token_scale(table.shape, tokens, conditioning, frequency, damping)
    table, twin = operations.twinned(table) if conditioning.preserve_norm else (table, None)
    return operations.scaled_gradient(table, twin, scale[:, None])


def conditioned_lookups(outputs, tokens, shape, conditioning, frequency, damping):
    """Returns what was looked up in a table of a shape, with the gradient of each token's row conditioned.

    See `conditioned_table`, which conditions the sum of a token's gradients.
    """
    scale = _token_scale(shape, tokens, conditioning, frequency, damping)
    return operations.scaled_gradient(outputs, None, ops.take(scale, tokens, axis=0)[..., None])


def _token_scale(shape, tokens, conditioning, frequency, damping):
    """Returns λ (λ + count/r)⁻¹ for every row of the table, `[vocabulary]`."""
    num_tokens = None if None in tokens.shape else math.prod(tokens.shape)
    conditioning.note(KernelCall(tuple(shape), num_represented=num_tokens, frequency=frequency, damping=damping))
    return damping / (damping + frequency)


def product(inputs, kernel, conditioning, mask, num_groups=0):
    """Returns `inputs @ kernel`, the kernel conditioned on the positions of the inputs.

    Args:
        inputs: tensor `[(groups,) samples, *positions, in]`.
        kernel: tensor `[(groups,) in, out]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[(groups,) samples, *positions]`, with or without the groups, true where a position counts, or `None`.
        num_groups: 1 if there is an axis of groups, else 0.
    """
    # `matmul` would promote integers.
    inputs = cast(ops.convert_to_tensor(inputs), kernel.dtype)
    is_matrix = len(inputs.shape) == num_groups + 2
    # Whether each row of the product counts by itself.
    has_product = mask is None and (is_matrix or conditioning.weight_sharing == "expand")
    if conditioning.per_replica and has_product and layout.num_replicas() > 1:
        return _product_by_replica(inputs, kernel, conditioning, num_groups)
    shape = ops.shape(inputs)
    outputs_shape = (*shape[:-1], kernel.shape[-1])
    outputs = Outputs(outputs_shape, mask=mask, num_groups=num_groups)
    call = _record(kernel, conditioning, sampled_rows(inputs, conditioning, mask, num_groups), outputs, has_product)
    kernel, twin, carrier = _with_twin_and_carrier(kernel, conditioning, outputs)
    # [(groups,) samples, *positions, in] -> [(groups,) rows, in]
    rows = inputs if is_matrix else ops.reshape(inputs, (*shape[:num_groups], math.prod(shape[num_groups:-1]), shape[-1]))
    if has_product and plan.choose(call) in (plan.SAMPLE, None):
        products = operations.conditioned_matmul(
            rows,
            kernel,
            twin,
            conditioning.damping,
            is_relative=conditioning.relative_damping,
            max_rows=None if is_matrix else conditioning.max_rows,
        )
    else:
        # `keras.ops.matmul` returns float32 for float64 on PyTorch.
        products = rows @ _conditioned_kernel(kernel, twin, conditioning, call)
    products = products if is_matrix else ops.reshape(products, outputs_shape)
    return products if carrier is None else products + carrier


def _product_by_replica(inputs, kernel, conditioning, num_groups):
    """Returns the product, each replica's rows being a group of their own, so that only its gradient crosses devices."""
    shape, num_replicas = tuple(inputs.shape), layout.num_replicas()
    rows = math.prod(shape[num_groups:-1])
    if rows % num_replicas:
        raise ValueError(
            f"`per_replica=True` splits the rows of a layer evenly over the {num_replicas} replicas of the distribution. Train "
            f"on batches of a multiple of {num_replicas} samples. Received: a batch that makes {rows} rows"
        )
    groups = shape[:num_groups]
    with layout.by_replica():
        # [(groups,) samples, *positions, in] -> [replicas, (groups,) rows of a replica, in]
        inputs = ops.reshape(inputs, (*groups, num_replicas, rows // num_replicas, shape[-1]))
        inputs = layout.laid_out(ops.moveaxis(inputs, num_groups, 0))
        kernel = layout.laid_out(ops.broadcast_to(kernel, (num_replicas, *kernel.shape)))
        products = product(inputs, kernel, conditioning.for_one_replica(num_replicas), None, num_groups + 1)
    return ops.reshape(ops.moveaxis(products, 0, num_groups), (*shape[:-1], kernel.shape[-1]))


def _record(matrix, conditioning, rows, outputs, has_product):
    num_output_rows = None
    if outputs is not None and conditioning.output_damping is not None:
        num_output_rows = rows.num_represented
        if num_output_rows is not None and conditioning.max_rows is not None:
            num_output_rows = min(num_output_rows, conditioning.max_rows)
    call = KernelCall(
        tuple(matrix.shape), rows.values, rows.num_counted, rows.num_represented, has_product, num_output_rows=num_output_rows
    )
    conditioning.note(call)
    return call


def _with_twin_and_carrier(kernel, conditioning, outputs):
    """Returns the kernel, a twin if its gradient's norm is preserved, and a carrier if its outputs' side is conditioned."""
    twin = carrier = None
    if conditioning.preserve_norm:
        kernel, twin = operations.twinned(kernel)
    if outputs is not None and conditioning.output_damping is not None:

        def rows_of(gradient, mask):
            gradient = outputs.rows_of(gradient)
            samples, *positions = ops.shape(gradient)[outputs.num_groups : -1]
            total = samples if conditioning.weight_sharing == "reduce" else samples * math.prod(positions)
            return sampled_rows(gradient, conditioning, mask, outputs.num_groups, summed=True), total

        kernel, carrier = operations.output_conditioned_kernel(
            kernel,
            ops.zeros(outputs.shape, kernel.dtype),
            conditioning.output_damping,
            outputs.mask,
            rows_of,
            is_relative=conditioning.relative_damping,
        )
    return kernel, twin, carrier


def _conditioned_kernel(kernel, twin, conditioning, call):
    return operations.conditioned_kernel(
        kernel, twin, call.rows, conditioning.damping, call.num_counted, is_relative=conditioning.relative_damping
    )


def bias_and_activation(layer, outputs, data_format="channels_last"):
    """Returns `outputs` with the layer's bias added and its activation applied."""
    if layer.bias is not None:
        bias = layer.bias
        if data_format == "channels_first":
            bias = ops.reshape(bias, (1, -1, *(1 for _ in outputs.shape[2:])))
        outputs = ops.add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)
