"""How embeddings read as rows times a kernel."""

import math
from typing import Any

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.curvature.operations import conditioned, scaled_gradient, scaled_gradient_of_norm
from keras_isaac.curvature.rows import KernelCall, sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, own_call, quantization, with_mask
from keras_isaac.layers.products import (
    ConditioningOf,
    Pairs,
    conditioned_matrices,
    conditioning_in_force,
    main_kernels,
    product,
)
from keras_isaac.scope import Conditioning


class EmbeddingAdapter:
    """`Embedding`: rows are one-hot, so that XᵀX holds the counts of the tokens, and conditioning divides by them.

    Multiplies each token's row of the gradient by λ (λ + count/r)⁻¹: exact, whatever `weight_sharing` and `max_rows` say. The
    norm of the table's gradient is known once all tokens are summed, so with `preserve_norm` the gradient is dense.
    """

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The table, or LoRA's factors."""
        return main_kernels(layer, "embeddings")

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Any:
        """`Embedding.call`, the gradient of each token's row scaled."""
        if hasattr(inputs, "with_flat_values"):
            # TensorFlow's ragged tensor.
            return inputs.with_flat_values(EmbeddingAdapter.call(self, layer, conditioning_of, inputs.flat_values))
        kernels = main_kernels(layer, "embeddings")
        conditioning = conditioning_in_force(kernels, conditioning_of)
        if len(kernels) == 2 or conditioning.preserve_norm:
            return call_with(layer, _conditioned_values(kernels, layer, conditioning_of, inputs), inputs)
        # A row's gradient is the sum of its tokens' gradients. Scaling those keeps TensorFlow's gradient sparse.
        tokens = ops.cast(ops.convert_to_tensor(inputs, sparse=False), "int32")
        outputs = keras.layers.Embedding.call(layer, inputs)
        scale = _token_scale(layer, tokens, conditioning, kernels[0].shape)
        return scaled_gradient(outputs, ops.take(scale, tokens, axis=0)[..., None])


class ReversibleEmbeddingAdapter(EmbeddingAdapter):
    """`ReversibleEmbedding`: an `Embedding`, and in reverse a product with its table transposed, or with another kernel."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The table, or LoRA's factors; and, if the weights are not tied, the reverse kernel."""
        has_reverse_kernel = not layer.tie_weights and quantization(layer) is None
        return super().kernels(layer) + ([layer.reverse_embeddings] if has_reverse_kernel else [])

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any, reverse: bool = False) -> Any:
        """`ReversibleEmbedding.call`."""
        kernels = [layer.reverse_embeddings] if reverse and not layer.tie_weights else super().kernels(layer)
        # Quantized, the layer does not use the factors in reverse.
        if not any(map(conditioning_of, kernels)) or (reverse and quantization(layer) is not None):
            return own_call(layer)(layer, inputs, reverse=reverse)
        if not reverse:
            outputs = super().call(layer, conditioning_of, inputs)
            return with_mask(outputs, keras.layers.Embedding.compute_mask(layer, inputs))
        conditioning, mask = conditioning_in_force(kernels, conditioning_of), mask_of(inputs)
        if len(kernels) == 2:
            # The inputs are multiplied by the second factor first, transposed.
            kernels.reverse()
            matrices = [ops.transpose(ops.convert_to_tensor(kernel)) for kernel in kernels]
            matrices = conditioned_matrices(kernels, matrices, conditioning_of, sampled_rows(inputs, conditioning, mask))
            return call_with(layer, zip(kernels, map(ops.transpose, matrices), strict=True), inputs, reverse=True)
        value = ops.convert_to_tensor(kernels[0])
        value = ops.transpose(value) if layer.tie_weights else value
        if layer.reverse_dtype is not None:
            inputs, value = ops.cast(inputs, layer.reverse_dtype), ops.cast(value, layer.reverse_dtype)
        logits = product(inputs, value, conditioning, mask)
        if layer.logit_soft_cap is not None:
            logits = ops.multiply(ops.tanh(ops.divide(logits, layer.logit_soft_cap)), layer.logit_soft_cap)
        return logits


def _token_scale(layer: Any, tokens: Any, conditioning: Conditioning, shape: tuple[int, ...]) -> Any:
    """Returns λ (λ + count/r)⁻¹ for every row of the table, `[input_dim]`. Padding is not valid if the layer masks it."""
    conditioning.refuse_outputs()
    # Keras looks up what a sparse tensor leaves out as token 0.
    num_tokens = None if None in tokens.shape else math.prod(tokens.shape)
    tokens = ops.reshape(tokens, (-1,))
    dtype = "float64" if layer.variable_dtype == "float64" else "float32"
    valid = ops.ones_like(tokens, dtype=dtype)
    if layer.mask_zero:
        valid = ops.cast(tokens != 0, dtype)
    # Keras looks up negative tokens from the end of the table.
    tokens = ops.where(tokens < 0, tokens + layer.input_dim, tokens)
    num_valid = backend.clip(ops.sum(valid), 1.0)
    frequency = backend.segment_sum(valid, tokens, layer.input_dim) / num_valid
    damping = ops.cast(conditioning.damping, dtype)
    if conditioning.relative_damping:
        # The trace of a covariance of one-hot rows is 1.
        damping = damping / backend.clip(num_valid, 1.0, float(layer.input_dim))
    conditioning.note(KernelCall(tuple(shape), num_tokens=num_tokens, frequency=frequency, damping=damping))
    return damping / (damping + frequency)


def _conditioned_values(kernels: list[keras.Variable], layer: Any, conditioning_of: ConditioningOf, inputs: Any) -> Pairs:
    """Returns pairs of a kernel that trains and its tensor. The gradient of the table is dense."""
    tokens, table = ops.cast(ops.convert_to_tensor(inputs, sparse=False), "int32"), ops.convert_to_tensor(kernels[0])
    conditioning, *others = map(conditioning_of, kernels)
    values = []
    if others and others[0] is not None:
        # The inputs of LoRA's second factor are the rows looked up in the first.
        mask = tokens != 0 if layer.mask_zero else None
        rows = sampled_rows(ops.take(ops.stop_gradient(table), tokens, axis=0), others[0], mask)
        values.append((kernels[1], conditioned(ops.convert_to_tensor(kernels[1]), others[0], rows)))
    if conditioning is not None:
        scale = _token_scale(layer, tokens, conditioning, table.shape)[:, None]
        condition = scaled_gradient_of_norm if conditioning.preserve_norm else scaled_gradient
        values.append((kernels[0], condition(table, scale)))
    return values
