"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table.

An adapter has two functions. `kernels(layer)` lists the variables that it conditions. `call(layer, conditioning_of, inputs)`
is the layer's own `call` with conditioned products; `conditioning_of(kernel)` is the `Conditioning` of a kernel, or `None`
where that kernel is to be left plain.
"""

import functools
import math

import keras
from keras import ops

from keras_isaac.calls import bias_and_activation, call_with, conditioned, conditioned_by_outputs, mask_of
from keras_isaac.convolutions import ConvAdapter, ConvTransposeAdapter, SeparableConvAdapter
from keras_isaac.equation import Equation
from keras_isaac.operations import conditioned_matmul, scaled_gradient
from keras_isaac.rows import representatives

# Eager PyTorch reads a layer's equation in every step.
_equation = functools.lru_cache(maxsize=256)(Equation)


class DenseAdapter:
    """`Dense`: every position of the input is a row; the kernel is `[in, out]`."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor, which is what meets the inputs then."""
        return [layer.lora_kernel_a if layer.lora_enabled else layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs, training=None):
        """`Dense.call`."""
        (kernel,) = DenseAdapter.kernels(layer)
        conditioning = conditioning_of(kernel)
        if layer.lora_enabled:
            rows = representatives(_dense(inputs), conditioning, mask_of(inputs))
            value = conditioned(ops.convert_to_tensor(kernel), conditioning, rows)
            return call_with(layer, [(kernel, value)], inputs, training=training)
        return bias_and_activation(layer, _product(inputs, ops.convert_to_tensor(kernel), conditioning, mask_of(inputs)))


class EinsumDenseAdapter:
    """`EinsumDense`: rows, groups, inputs and outputs of the kernel are read off the equation."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor, if an axis of the inputs is contracted with it."""
        equation = _equation(layer.equation)
        if not equation.is_product:
            return []
        if not layer.lora_enabled:
            return [layer.kernel]
        # LoRA factors the last axis off the kernel, which must not be one that meets the inputs.
        return [layer.lora_kernel_a] if equation.kernel[-1] in equation.outputs else []

    @staticmethod
    def call(layer, conditioning_of, inputs, training=None):
        """`EinsumDense.call`."""
        equation = _equation(layer.equation, len(inputs.shape))
        (kernel,) = EinsumDenseAdapter.kernels(layer)
        conditioning = conditioning_of(kernel)
        value, mask = ops.convert_to_tensor(kernel), mask_of(inputs)
        matrix, rows = equation.matrix_of(value), equation.rows_of(_dense(inputs))
        mask = None if mask is None else equation.mask_of(mask, inputs)
        if layer.lora_enabled:
            matrix = conditioned(matrix, conditioning, representatives(rows, conditioning, mask, equation.num_groups))
            return call_with(layer, [(kernel, equation.kernel_of(matrix, value.shape))], inputs, training=training)
        products = _product(rows, matrix, conditioning, mask, equation.num_groups)
        return bias_and_activation(layer, equation.output_of(products, value.shape))


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
        # Keras looks up what a sparse tensor leaves out as token 0.
        inputs = _dense(inputs)
        (kernel,) = EmbeddingAdapter.kernels(layer)
        conditioning = conditioning_of(kernel)
        if layer.lora_enabled or conditioning.preserve_norm or conditioning.observe is not None:
            return call_with(layer, [(kernel, _conditioned_table(layer, kernel, conditioning, inputs))], inputs)
        # A row's gradient is the sum of its tokens' gradients. Scaling those keeps TensorFlow's gradient sparse.
        scale = _token_scale(*_token_frequency(layer, conditioning, inputs))
        tokens = ops.cast(inputs, "int32")
        return scaled_gradient(keras.layers.Embedding.call(layer, inputs), ops.take(scale, tokens, axis=0)[..., None])


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
        logits = _product(inputs, value, conditioning, mask)
        if layer.logit_soft_cap is not None:
            logits = ops.multiply(ops.tanh(ops.divide(logits, layer.logit_soft_cap)), layer.logit_soft_cap)
        return logits


_KINDS = {
    "Dense": DenseAdapter,
    "EinsumDense": EinsumDenseAdapter,
    "Conv1D": ConvAdapter,
    "Conv2D": ConvAdapter,
    "Conv3D": ConvAdapter,
    "DepthwiseConv1D": ConvAdapter,
    "DepthwiseConv2D": ConvAdapter,
    "SeparableConv1D": SeparableConvAdapter,
    "SeparableConv2D": SeparableConvAdapter,
    "Conv1DTranspose": ConvTransposeAdapter,
    "Conv2DTranspose": ConvTransposeAdapter,
    "Conv3DTranspose": ConvTransposeAdapter,
    "Embedding": EmbeddingAdapter,
    "ReversibleEmbedding": ReversibleEmbeddingAdapter,
}
# Looked up by the function that computes the layer: a subclass with a `call` of its own is another kind of layer. An older
# Keras has not all of them.
_ADAPTERS = {getattr(keras.layers, name).call: adapter for name, adapter in _KINDS.items() if hasattr(keras.layers, name)}


def register_layer(layer_class, kernel, rows):
    """Says how a layer of your own reads, so that `capture_inputs` captures it.

    For a layer that multiplies its inputs by a kernel, once a position, and then does what it likes. Its own `call` keeps
    running; only the gradient of the kernel changes.

    Args:
        layer_class: subclass of `keras.Layer` with a `call` of its own.
        kernel: string, the attribute that holds the kernel, a variable whose first axes are those that meet the inputs.
        rows: function of the layer and the first argument of `call`, which returns what meets the kernel, a tensor
            `[samples, *positions, in]`.

    Raises:
        TypeError: if `layer_class` is no layer class, `kernel` no string or `rows` no function.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs, register_layer
    >>> class Scores(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.weight = self.add_weight(shape=(input_shape[-1], 1))
    ...     def call(self, inputs):
    ...         return keras.ops.softmax(keras.ops.matmul(inputs, self.weight), axis=-2)
    >>> register_layer(Scores, kernel="weight", rows=lambda layer, inputs: inputs)
    >>> layer = capture_inputs(Scores())
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(f"`layer_class` must be a subclass of `keras.Layer`. Received: layer_class={layer_class!r}")
    if not isinstance(kernel, str) or not callable(rows):
        raise TypeError(
            "`kernel` must be the name of an attribute and `rows` a function of the layer and its inputs. "
            f"Received: kernel={kernel!r}, rows={rows!r}"
        )
    _ADAPTERS[layer_class.call] = RegisteredAdapter(layer_class.__name__, kernel, rows)


class RegisteredAdapter:
    """A layer of the user's: rows by its function, the rest by its own `call`."""

    def __init__(self, name, kernel, rows):
        self.name, self.kernel, self.rows = name, kernel, rows

    def kernels(self, layer):
        """The named variable."""
        return [getattr(layer, self.kernel)]

    def call(self, layer, conditioning_of, inputs, *args, **kwargs):
        """The layer's own `call`."""
        (kernel,) = self.kernels(layer)
        value, rows = ops.convert_to_tensor(kernel), self.rows(layer, inputs)
        if math.prod(value.shape) % rows.shape[-1]:
            raise ValueError(
                f"The rows registered for {self.name} layer '{layer.path}' do not fit its kernel: the last axis of the rows "
                "must be the product of the kernel's first axes. "
                f"Received: rows of shape {tuple(rows.shape)}, `{self.kernel}` of shape {tuple(value.shape)}"
            )
        matrix = ops.reshape(value, (rows.shape[-1], -1))
        conditioning = conditioning_of(kernel)
        matrix = conditioned(matrix, conditioning, representatives(rows, conditioning, mask_of(inputs)))
        return call_with(layer, [(kernel, ops.reshape(matrix, value.shape))], inputs, *args, **kwargs)


def adapter_of(layer):
    """Returns the adapter of `layer`, or `None` if its kind is not supported."""
    return _ADAPTERS.get(type(layer).call)


def supported_kinds():
    """Returns the names of the layers that can be conditioned."""
    registered = [adapter.name for adapter in _ADAPTERS.values() if isinstance(adapter, RegisteredAdapter)]
    return [*_KINDS, *registered]


def _product(inputs, kernel, conditioning, mask, num_groups=0):
    """Returns `inputs @ kernel`, the kernel conditioned on the positions of the inputs.

    Args:
        inputs: tensor `[(groups,) samples, *positions, in]`.
        kernel: tensor `[(groups,) in, out]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[samples, *positions]`, true where a position counts, or `None`.
        num_groups: 1 if there is an axis of groups, else 0.
    """
    # What `matmul` promotes, the conditioned product is given: sparse inputs dense, integers in the kernel's dtype.
    inputs = ops.cast(_dense(inputs), kernel.dtype)
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


def _token_frequency(layer, conditioning, inputs):
    """Returns how often each row of the table is met, `[input_dim]`, as a share, and the damping that stands beside it.

    Padding does not count if the layer masks it.
    """
    tokens = ops.reshape(ops.cast(inputs, "int32"), (-1,))
    dtype = "float64" if layer.variable_dtype == "float64" else "float32"
    counted = ops.ones_like(tokens, dtype=dtype)
    if layer.mask_zero:
        counted = ops.cast(tokens != 0, dtype)
    num_counted = ops.maximum(ops.sum(counted), 1.0)
    frequency = ops.segment_sum(counted, tokens, num_segments=layer.input_dim) / num_counted
    damping = ops.cast(conditioning.damping, dtype)
    if conditioning.relative_damping:
        # The trace of a covariance of one-hot rows is 1.
        damping = damping / ops.minimum(num_counted, float(layer.input_dim))
    return frequency, damping


def _token_scale(frequency, damping):
    """Returns λ (λ + count/r)⁻¹ for every row of the table, `[input_dim]`."""
    return damping / (damping + frequency)


def _conditioned_table(layer, kernel, conditioning, inputs):
    """Returns the table with its gradient conditioned, as a dense one."""
    frequency, damping = _token_frequency(layer, conditioning, inputs)
    scale = _token_scale(frequency, damping)[:, None]

    def condition(table):
        return scaled_gradient(table, scale, conditioning.preserve_norm)

    return conditioning.watched(condition, ops.convert_to_tensor(kernel), rows=inputs, frequency=frequency, damping=damping)


def _dense(inputs):
    return ops.convert_to_tensor(inputs, sparse=False)
