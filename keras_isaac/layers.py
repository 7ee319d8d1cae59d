"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table.

An adapter has two functions. `kernels(layer)` lists the variables that it conditions. `call(layer, conditioning_of, inputs)`
is the layer's own `call` with conditioned products; `conditioning_of(kernel)` is the `Conditioning` of a kernel, or `None`
where that kernel is to be left plain.
"""

import math

import keras
from keras import ops

from keras_isaac.equation import Equation
from keras_isaac.operations import conditioned_kernel, conditioned_matmul, scaled_gradient
from keras_isaac.rows import patches, representatives


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
        if layer.lora_enabled:
            rows = representatives(_dense(inputs), conditioning_of(kernel), _mask(inputs))
            tapped = _conditioned(ops.convert_to_tensor(kernel), conditioning_of(kernel), rows)
            return call_with(layer, [(kernel, tapped)], inputs, training=training)
        outputs = _product(inputs, ops.convert_to_tensor(kernel), conditioning_of(kernel), _mask(inputs))
        return _bias_and_activation(layer, outputs)


class EinsumDenseAdapter:
    """`EinsumDense`: rows, groups, inputs and outputs of the kernel are read off the equation."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor, if an axis of the inputs is contracted with it."""
        equation = Equation(layer.equation)
        if not equation.is_product:
            return []
        if not layer.lora_enabled:
            return [layer.kernel]
        # LoRA factors the last axis off the kernel, which must not be one that meets the inputs.
        return [layer.lora_kernel_a] if equation.kernel[-1] in equation.outputs else []

    @staticmethod
    def call(layer, conditioning_of, inputs, training=None):
        """`EinsumDense.call`."""
        equation = Equation(layer.equation, len(inputs.shape))
        (kernel,) = EinsumDenseAdapter.kernels(layer)
        conditioning = conditioning_of(kernel)
        value, mask = ops.convert_to_tensor(kernel), _mask(inputs)
        matrix, rows = equation.matrix_of(value), equation.rows_of(_dense(inputs))
        mask = None if mask is None else equation.mask_of(mask, inputs)
        num_groups, shape = equation.num_groups, ops.shape(rows)
        shared = len(shape) > num_groups + 2
        if layer.lora_enabled or mask is not None or (shared and conditioning.weight_sharing == "reduce"):
            matrix = _conditioned(matrix, conditioning, representatives(rows, conditioning, mask, num_groups))
            return call_with(layer, [(kernel, equation.kernel_of(matrix, value.shape))], inputs, training=training)
        if shared:
            rows = ops.reshape(rows, (*shape[:num_groups], -1, shape[-1]))
        max_rows = conditioning.max_rows if shared else None
        products = conditioned_matmul(ops.cast(rows, matrix.dtype), matrix, conditioning.damping, max_rows)
        return _bias_and_activation(layer, equation.output_of(products, shape, value.shape))


class ConvAdapter:
    """`Conv1D/2D/3D` (and `DepthwiseConv`): a row is the patch that the kernel meets; feature groups are groups."""

    @staticmethod
    def kernels(layer):
        """The kernel, or LoRA's first factor."""
        return [layer.lora_kernel_a if getattr(layer, "lora_enabled", False) else layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call`, its kernel conditioned on patches."""
        (kernel,) = ConvAdapter.kernels(layer)
        value = ops.convert_to_tensor(kernel)
        depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
        tapped = _conditioned_convolution(layer, value, conditioning_of(kernel), inputs, depthwise)
        return call_with(layer, [(kernel, tapped)], inputs)


class SeparableConvAdapter:
    """`SeparableConv1D/2D`: a depthwise convolution, and a product of what comes out of it at each position."""

    @staticmethod
    def kernels(layer):
        """Both kernels."""
        return [layer.depthwise_kernel, layer.pointwise_kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call` in its two steps."""
        depthwise, pointwise = (ops.convert_to_tensor(kernel) for kernel in SeparableConvAdapter.kernels(layer))
        conditioning = conditioning_of(layer.depthwise_kernel)
        if conditioning is not None:
            depthwise = _conditioned_convolution(layer, depthwise, conditioning, inputs, depthwise=True)
        options = {"padding": layer.padding, "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
        strides = layer.strides if layer.data_format == "channels_last" else layer.strides[-layer.rank :]
        inputs = ops.depthwise_conv(inputs, depthwise, strides=strides, **options)
        conditioning = conditioning_of(layer.pointwise_kernel)
        if conditioning is not None:
            rows = representatives(_channels_last(layer, inputs), conditioning)
            matrix = ops.reshape(pointwise, pointwise.shape[-2:])
            matrix = _conditioned(matrix, conditioning, rows)
            pointwise = ops.reshape(matrix, pointwise.shape)
        outputs = ops.conv(inputs, pointwise, strides=1, padding="valid", data_format=layer.data_format)
        return _bias_and_activation(layer, outputs, layer.data_format)


class ConvTransposeAdapter:
    """`Conv1D/2D/3DTranspose`: every pixel is a row, whose product is a patch of the output."""

    @staticmethod
    def kernels(layer):
        """The kernel, `[*kernel_size, out, in]`."""
        return [layer.kernel]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """The layer's own `call`, its kernel conditioned on pixels."""
        value = ops.convert_to_tensor(layer.kernel)
        rows = representatives(_channels_last(layer, inputs), conditioning_of(layer.kernel))
        matrix = ops.transpose(ops.reshape(value, (-1, value.shape[-1])))
        matrix = _conditioned(matrix, conditioning_of(layer.kernel), rows)
        return call_with(layer, [(layer.kernel, ops.reshape(ops.transpose(matrix), value.shape))], inputs)


class EmbeddingAdapter:
    """`Embedding`: rows are one-hot, so that XᵀX holds the counts of the tokens, and conditioning divides by them.

    λ (λ + count/r)⁻¹ for each token's row of the table: exact, whatever `weight_sharing` and `max_rows` say.
    """

    @staticmethod
    def kernels(layer):
        """The table, or LoRA's first factor."""
        return [layer.lora_embeddings_a if layer.lora_enabled else layer.embeddings]

    @staticmethod
    def call(layer, conditioning_of, inputs):
        """`Embedding.call`, the gradient of each token's row scaled."""
        (kernel,) = EmbeddingAdapter.kernels(layer)
        scale = _token_scale(layer, conditioning_of(kernel), inputs)
        if layer.lora_enabled:
            tapped = scaled_gradient(ops.convert_to_tensor(kernel), scale[:, None])
            return call_with(layer, [(kernel, tapped)], inputs)
        # A row's gradient is the sum of its tokens' gradients. Scaling those keeps TensorFlow's gradient sparse.
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
                scale = _token_scale(layer, conditioning, inputs)[:, None]
                return call_with(layer, [(kernel, scaled_gradient(ops.convert_to_tensor(kernel), scale))], inputs)
            outputs = EmbeddingAdapter.call(layer, conditioning_of, inputs)
            outputs._keras_mask = keras.layers.Embedding.compute_mask(layer, inputs)
            return outputs
        value = ops.convert_to_tensor(kernel)
        value = ops.transpose(value) if layer.tie_weights else value
        mask = _mask(inputs)
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
        matrix = _conditioned(matrix, conditioning, representatives(rows, conditioning, _mask(inputs)))
        return call_with(layer, [(kernel, ops.reshape(matrix, value.shape))], inputs, *args, **kwargs)


def adapter_of(layer):
    """Returns the adapter of `layer`, or `None` if its kind is not supported."""
    return _ADAPTERS.get(type(layer).call)


def supported_kinds():
    """Returns the names of the layers that can be conditioned."""
    registered = [adapter.name for adapter in _ADAPTERS.values() if isinstance(adapter, RegisteredAdapter)]
    return [*_KINDS, *registered]


def call_with(layer, values, *args, **kwargs):
    """Returns the layer's own `call`, with tensors in the place of some of its variables.

    Args:
        layer: the layer.
        values: list of pairs of a variable and a tensor.
        *args: arguments of `call`.
        **kwargs: keyword arguments of `call`.
    """
    replaced = {id(variable): value for variable, value in values}
    before = [(variable, replaced.get(id(variable), variable.value)) for variable in layer.variables]
    with keras.StatelessScope(before, collect_losses=True) as stateless:
        outputs = type(layer).call(layer, *args, **kwargs)
    # What the call did beside its result is the layer's to keep.
    for variable, value in before:
        after = stateless.get_current_value(variable)
        if after is not None and after is not value:
            variable.assign(after)
    for loss in stateless.losses:
        layer.add_loss(loss)
    return outputs


def _product(inputs, kernel, conditioning, mask):
    """Returns `inputs @ kernel`, the kernel conditioned on the positions of the inputs."""
    # What `matmul` promotes, the conditioned product is given: sparse inputs dense, integers in the kernel's dtype.
    inputs = ops.cast(_dense(inputs), kernel.dtype)
    shared = len(inputs.shape) > 2
    if mask is not None or (shared and conditioning.weight_sharing == "reduce"):
        return ops.matmul(inputs, _conditioned(kernel, conditioning, representatives(inputs, conditioning, mask)))
    rows = ops.reshape(inputs, (-1, kernel.shape[0])) if shared else inputs
    outputs = conditioned_matmul(rows, kernel, conditioning.damping, conditioning.max_rows if shared else None)
    return ops.reshape(outputs, (*ops.shape(inputs)[:-1], kernel.shape[1])) if shared else outputs


def _conditioned(matrix, conditioning, representatives):
    """Returns the kernel `[(groups,) in, out]` with its gradient conditioned on rows, of which some may not count."""
    rows, num_rows = representatives
    return conditioned_kernel(matrix, rows, conditioning.damping, num_rows)


def _conditioned_convolution(layer, kernel, conditioning, inputs, depthwise):
    """Returns the kernel `[*kernel_size, in of a group, out of all groups]` with its gradient conditioned on patches."""
    inputs = _channels_last(layer, inputs)
    if None in inputs.shape[1:-1]:
        # TensorFlow may trace a step for images of any size. There is no grid of patches then, and the gradient is plain.
        return kernel
    rows = patches(inputs, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, conditioning)
    size, (num_in, num_out) = rows.shape[1], kernel.shape[-2:]
    if depthwise:
        # [*kernel_size, channels, multiplier]: every channel is a group.
        matrix = ops.swapaxes(ops.reshape(kernel, (size, num_in, num_out)), 0, 1)
        matrix = _conditioned(matrix, conditioning, (ops.transpose(rows, (2, 0, 1)), None))
        return ops.reshape(ops.swapaxes(matrix, 0, 1), kernel.shape)
    groups = layer.groups
    if groups == 1:
        matrix = ops.reshape(kernel, (size * num_in, num_out))
        matrix = _conditioned(matrix, conditioning, (ops.reshape(rows, (-1, size * num_in)), None))
        return ops.reshape(matrix, kernel.shape)
    rows = ops.transpose(ops.reshape(rows, (-1, size, groups, num_in)), (2, 0, 1, 3))
    rows = ops.reshape(rows, (groups, -1, size * num_in))
    matrix = ops.swapaxes(ops.reshape(kernel, (size * num_in, groups, num_out // groups)), 0, 1)
    matrix = _conditioned(matrix, conditioning, (rows, None))
    return ops.reshape(ops.swapaxes(matrix, 0, 1), kernel.shape)


def _token_scale(layer, conditioning, inputs):
    """Returns λ (λ + count/r)⁻¹ for every row of the table, `[input_dim]`; padding does not count if the layer masks it."""
    tokens = ops.reshape(ops.cast(inputs, "int32"), (-1,))
    counted = ops.ones_like(tokens, dtype="float32")
    if layer.mask_zero:
        counted = ops.cast(tokens != 0, "float32")
    frequency = ops.segment_sum(counted, tokens, num_segments=layer.input_dim) / ops.maximum(ops.sum(counted), 1.0)
    damping = ops.cast(conditioning.damping, "float32")
    return damping / (damping + frequency)


def _channels_last(layer, inputs):
    return inputs if layer.data_format == "channels_last" else ops.moveaxis(inputs, 1, -1)


def _bias_and_activation(layer, outputs, data_format="channels_last"):
    if layer.bias is not None:
        bias = layer.bias
        if data_format == "channels_first":
            bias = ops.reshape(bias, (1, -1, *(1 for _ in outputs.shape[2:])))
        outputs = ops.add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)


class _MaskReader(keras.layers.Layer):
    """Shows the mask that Keras carries with its input."""

    def __init__(self, show):
        super().__init__(autocast=False)
        self.show = show
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.show(mask)
        return inputs


def _mask(inputs):
    """Returns the mask that Keras carries with a tensor, or `None`."""
    if keras.backend.backend() != "jax":
        return getattr(inputs, "_keras_mask", None)
    # A JAX tracer takes no attributes. Keras keeps its mask elsewhere, and hands it to a layer that asks.
    masks = []
    _MaskReader(masks.append)(inputs)
    return masks[0]


def _dense(inputs):
    return ops.convert_to_tensor(inputs, sparse=False)
