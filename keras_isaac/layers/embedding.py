"""How embeddings read as rows times a kernel."""

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.layers.calls import as_dense, call_with, conditioned_lookups, conditioned_table, mask_of, product


class EmbeddingAdapter:
    """`Embedding`: rows are one-hot, so that XᵀX holds the counts of the tokens, and conditioning divides by them.

    λ (λ + count/r)⁻¹ for each token's row of the table: exact, whatever `weight_sharing` and `max_rows` say. The norm of the
    table's gradient is known once all tokens are summed, so that one which preserves it is dense.
    """

    @staticmethod
    def kernels(layer):
        """The table, or LoRA's first factor."""
        return [layer.lora_embeddings_a if layer.lora_enabled else layer.embeddings]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """`Embedding.call`, the gradient of each token's row scaled."""
        if hasattr(inputs, "with_flat_values"):
            # TensorFlow's ragged tensor.
            return inputs.with_flat_values(EmbeddingAdapter.call(layer, conditioning_of, inputs.flat_values))
        (kernel,) = EmbeddingAdapter.kernels(layer)
        conditioning = conditioning_of(kernel)
        if layer.lora_enabled or conditioning.preserve_norm:
            return call_with(layer, [(kernel, _conditioned_table(layer, kernel, conditioning, inputs))], inputs)
        # A row's gradient is the sum of its tokens' gradients. Scaling those keeps TensorFlow's gradient sparse.
        tokens = ops.cast(as_dense(inputs), "int32")
        outputs = keras.layers.Embedding.call(layer, inputs)
        return conditioned_lookups(outputs, tokens, kernel.shape, conditioning, *_token_frequency(layer, conditioning, tokens))


class ReversibleEmbeddingAdapter:
    """`ReversibleEmbedding`: an `Embedding`, and in reverse a product with its table transposed, or with another kernel."""

    @staticmethod
    def kernels(layer):
        """The table and, if the weights are not tied, the reverse kernel."""
        return EmbeddingAdapter.kernels(layer) + ([] if layer.tie_weights else [layer.reverse_embeddings])

    @staticmethod
    def call(layer, conditioning_of, inputs, reverse=False):
        """`ReversibleEmbedding.call`."""
        kernel = ReversibleEmbeddingAdapter.kernels(layer)[-1 if reverse else 0]
        conditioning = conditioning_of(kernel)
        if conditioning is None or (reverse and layer.lora_enabled):
            return keras.layers.ReversibleEmbedding.call(layer, inputs, reverse=reverse)
        if not reverse:
            if keras.backend.backend() == "jax":
                # The layer gives its output a mask, which on JAX nobody else can. There, gradients of tables are dense anyway.
                return call_with(layer, [(kernel, _conditioned_table(layer, kernel, conditioning, inputs))], inputs)
            outputs = EmbeddingAdapter.call(layer, conditioning_of, inputs)
            outputs._keras_mask = keras.layers.Embedding.compute_mask(layer, inputs)
            return outputs
        value = ops.convert_to_tensor(kernel)
        value = ops.transpose(value) if layer.tie_weights else value
        mask = mask_of(inputs)
        if layer.reverse_dtype is not None:
            inputs, value = ops.cast(inputs, layer.reverse_dtype), ops.cast(value, layer.reverse_dtype)
        logits = product(inputs, value, conditioning, mask)
        if layer.logit_soft_cap is not None:
            logits = ops.multiply(ops.tanh(ops.divide(logits, layer.logit_soft_cap)), layer.logit_soft_cap)
        return logits


def _token_frequency(layer, conditioning, tokens):
    """Returns how often each row of the table is met, `[input_dim]`, as a share, and the damping that stands beside it.

    Padding does not count if the layer masks it.
    """
    # Keras looks up what a sparse tensor leaves out as token 0.
    tokens = ops.reshape(tokens, (-1,))
    dtype = "float64" if layer.variable_dtype == "float64" else "float32"
    counted = ops.ones_like(tokens, dtype=dtype)
    if layer.mask_zero:
        counted = ops.cast(tokens != 0, dtype)
    num_counted = backend.clip(ops.sum(counted), 1.0)
    frequency = backend.segment_sum(counted, tokens, layer.input_dim) / num_counted
    damping = ops.cast(conditioning.damping, dtype)
    if conditioning.relative_damping:
        # The trace of a covariance of one-hot rows is 1.
        damping = damping / backend.clip(num_counted, 1.0, float(layer.input_dim))
    return frequency, damping


def _conditioned_table(layer, kernel, conditioning, inputs):
    """Returns the table with its gradient conditioned, as a dense one."""
    tokens = ops.cast(as_dense(inputs), "int32")
    frequency, damping = _token_frequency(layer, conditioning, tokens)
    return conditioned_table(ops.convert_to_tensor(kernel), tokens, conditioning, frequency, damping)
