"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table.

An adapter has two functions. `kernels(layer)` lists the variables that it conditions. `call(layer, conditioning_of, inputs)`
is the layer's own `call` with conditioned products; `conditioning_of(kernel)` is the `Conditioning` of a kernel, or `None`
where that kernel is to be left plain.
"""

import keras

from keras_isaac.layers.convolution import ConvAdapter, ConvTransposeAdapter, SeparableConvAdapter
from keras_isaac.layers.dense import DenseAdapter
from keras_isaac.layers.einsum import EinsumDenseAdapter
from keras_isaac.layers.embedding import EmbeddingAdapter, ReversibleEmbeddingAdapter
from keras_isaac.layers.registered import RegisteredAdapter

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


def adapter_of(layer):
    """Returns the adapter of `layer`, or `None` if its kind is not supported."""
    return _ADAPTERS.get(type(layer).call)


def kernels_of(layer):
    """Returns the variables that the adapter of `layer` conditions.

    A kernel that the layer computes, as weight normalization does, is none: the conditioned gradient of the product is no
    direction of descent for what it is computed from.
    """
    return [kernel for kernel in adapter_of(layer).kernels(layer) if isinstance(kernel, keras.Variable)]


def supported_kinds():
    """Returns the names of the layers that can be conditioned."""
    registered = [adapter.name for adapter in _ADAPTERS.values() if isinstance(adapter, RegisteredAdapter)]
    return [*_KINDS, *registered]
