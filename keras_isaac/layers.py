"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table.

An adapter has two functions. `kernels(layer)` lists the variables that it conditions. `call(layer, conditioning_of, inputs)`
is the layer's own `call` with conditioned products; `conditioning_of(kernel)` is the `Conditioning` of a kernel, or `None`
where that kernel is to be left plain.
"""

import functools
import math

import keras
from keras import ops

from keras_isaac.calls import as_dense, bias_and_activation, call_with, conditioned, mask_of, product
from keras_isaac.convolutions import ConvAdapter, ConvTransposeAdapter, SeparableConvAdapter
from keras_isaac.embeddings import EmbeddingAdapter, ReversibleEmbeddingAdapter
from keras_isaac.equation import Equation
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
            rows = representatives(as_dense(inputs), conditioning, mask_of(inputs))
            value = conditioned(ops.convert_to_tensor(kernel), conditioning, rows)
            return call_with(layer, [(kernel, value)], inputs, training=training)
        return bias_and_activation(layer, product(inputs, ops.convert_to_tensor(kernel), conditioning, mask_of(inputs)))


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
        matrix, rows = equation.matrix_of(value), equation.rows_of(as_dense(inputs))
        mask = None if mask is None else equation.mask_of(mask, inputs)
        if layer.lora_enabled:
            matrix = conditioned(matrix, conditioning, representatives(rows, conditioning, mask, equation.num_groups))
            return call_with(layer, [(kernel, equation.kernel_of(matrix, value.shape))], inputs, training=training)
        products = product(rows, matrix, conditioning, mask, equation.num_groups)
        return bias_and_activation(layer, equation.output_of(products, value.shape))


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
