"""How each kind of layer reads as rows times a kernel: one adapter a kind, one table.

`register_adapter` says what an adapter is. One here may also have a function `notes(layer)`, which returns a dictionary from a
kernel's id to a note on which part of it stays plain.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import keras
from keras import ops

from keras_isaac.curvature.operations import conditioned
from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of
from keras_isaac.layers.convolution import ConvAdapter, ConvTransposeAdapter, SeparableConvAdapter
from keras_isaac.layers.dense import DenseAdapter
from keras_isaac.layers.einsum import EinsumDenseAdapter
from keras_isaac.layers.embedding import EmbeddingAdapter, ReversibleEmbeddingAdapter
from keras_isaac.layers.products import ConditioningOf, is_sparse, note_sparse
from keras_isaac.layers.recurrent import BidirectionalAdapter, RNNAdapter
from keras_isaac.layers.time_distributed import TimeDistributedAdapter

__all__ = ["call_with", "conditioned", "mask_of", "register_adapter", "register_layer", "sampled_rows"]


class RegisteredAdapter:
    """A registered layer: one function of rows per kernel, and the layer's own `call`."""

    def __init__(self, **reads: tuple[Callable[[Any, Any], Any], bool]) -> None:
        # By the attribute of a kernel: its function of rows, and whether its first axis is one of groups.
        self.reads = reads

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The named variables."""
        # "bank.weight" is an attribute of an attribute.
        return [functools.reduce(getattr, kernel.split("."), layer) for kernel in self.reads]

    def call(self, layer: Any, conditioning_of: ConditioningOf, /, *args: Any, **kwargs: Any) -> Any:
        """The layer's own `call`. Its first argument may have any name, be passed by keyword and be a nest of tensors."""
        inputs = args[0] if args else kwargs[list(inspect.signature(type(layer).call).parameters)[1]]
        values = []
        for variable, (name, (rows_of, groups)) in zip(self.kernels(layer), self.reads.items(), strict=True):
            conditioning = conditioning_of(variable)
            if conditioning is None:
                continue
            rows = rows_of(layer, inputs)
            rows, mask = rows if isinstance(rows, tuple) else (rows, mask_of(inputs) if ops.is_tensor(inputs) else None)
            if is_sparse(rows):
                note_sparse(layer, [conditioning])
                continue
            value, num_groups = ops.convert_to_tensor(variable), int(groups)
            group_shape, num_in = tuple(rows.shape[:num_groups]), rows.shape[-1]
            if tuple(value.shape[:num_groups]) != group_shape or math.prod(value.shape[num_groups:]) % num_in:
                axes = "after an axis of groups, the last axis of the rows" if groups else "the last axis of the rows"
                raise ValueError(
                    f"The rows registered for {type(layer).__name__} layer '{layer.path}' do not fit its kernel: {axes} "
                    "must be the product of the kernel's first axes. "
                    f"Received: rows of shape {tuple(rows.shape)}, `{name}` of shape {tuple(value.shape)}"
                )
            matrix = ops.reshape(value, (*group_shape, num_in, -1))
            matrix = conditioned(matrix, conditioning, sampled_rows(rows, conditioning, mask, num_groups))
            values.append((variable, ops.reshape(matrix, value.shape)))
        return call_with(layer, values, *args, **kwargs)


_KINDS: dict[str, Any] = {
    "Dense": DenseAdapter(),
    # Multiplies by a kernel that it computes from the trained one, whose whole gradient is conditioned when it is finished.
    "TernaryDense": RegisteredAdapter(kernel=(lambda layer, inputs: inputs, False)),
    "EinsumDense": EinsumDenseAdapter(),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"), ConvAdapter()),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), SeparableConvAdapter()),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), ConvTransposeAdapter()),
    "Embedding": EmbeddingAdapter(),
    "ReversibleEmbedding": ReversibleEmbeddingAdapter(),
    **dict.fromkeys(("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), RNNAdapter()),
    "Bidirectional": BidirectionalAdapter(),
    "TimeDistributed": TimeDistributedAdapter(),
}
# Keyed by the layer's `call` function: a subclass that overrides `call` is another kind of layer. Older versions of Keras lack
# some of them.
ADAPTERS = {getattr(keras.layers, name).call: adapter for name, adapter in _KINDS.items() if hasattr(keras.layers, name)}


def register_layer(layer_class: type[keras.Layer], kernel: str, rows: Callable[[Any, Any], Any], groups: bool = False) -> None:
    """Registers a custom layer, so that `capture_inputs` captures it.

    For a layer that multiplies its inputs by a kernel, once per position, whatever it computes from the product. Its own `call`
    keeps running; only the gradient of the kernel changes.

    Args:
        layer_class: subclass of `keras.Layer` with a `call` of its own.
        kernel: string, the attribute that holds the kernel, a variable whose first axes are contracted with the inputs. A dot
            leads to a layer inside: `"experts.weight"`. For a layer of several kernels, call this once for each.
        rows: function of the layer and the first argument of `call`, which returns the kernel's inputs, a tensor
            `[samples, *positions, in]`; or that and a mask `[samples, *positions]`, true where a row is valid. Without one,
            the mask that Keras carries with the inputs is used.
        groups: boolean, whether the first axis of the kernel is one of groups, such as experts or heads, each with
            rows of its own: the kernel is `[groups, in, ...]`, the rows `[groups, samples, *positions, in]`, and the mask
            with or without the groups. Defaults to `False`.

    Raises:
        TypeError: if `layer_class` is not a layer class, `kernel` not a string or `rows` not a function.
        ValueError: if `layer_class` has no `call` of its own.

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
    _check_class(layer_class)
    if not isinstance(kernel, str) or not callable(rows):
        raise TypeError(
            "`kernel` must be the name of an attribute and `rows` a function of the layer and its inputs. "
            f"Received: kernel={kernel!r}, rows={rows!r}"
        )
    adapter = ADAPTERS.get(layer_class.call)
    if not isinstance(adapter, RegisteredAdapter):
        adapter = ADAPTERS[layer_class.call] = RegisteredAdapter()
    adapter.reads[kernel] = rows, groups


class Adapter(Protocol):
    """What `register_adapter` takes: any object of these two functions."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """Lists the variables of `layer` that are conditioned."""

    def call(self, layer: Any, conditioning_of: ConditioningOf, /, *args: Any, **kwargs: Any) -> Any:
        """Returns what the `call` of `layer` returns, its products conditioned."""


def register_adapter(layer_class: type[keras.Layer], adapter: Adapter) -> None:
    """Registers an adapter for a custom layer that `register_layer` cannot describe.

    Args:
        layer_class: subclass of `keras.Layer` with a `call` of its own.
        adapter: object of two functions. `kernels(layer)` lists the variables that it conditions.
            `call(layer, conditioning_of, inputs, ...)` replaces the layer's `call` in a training step, with the products or
            kernels conditioned; `conditioning_of(kernel)` is the `Conditioning` of a kernel, or `None` if it is to be left
            plain. `keras_isaac.layers` has the functions to write it with: `sampled_rows`, `conditioned`, `mask_of` and
            `call_with`.

    Raises:
        TypeError: if `layer_class` is not a layer class, or the adapter lacks one of the functions.
        ValueError: if `layer_class` has no `call` of its own.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs, register_adapter
    >>> from keras_isaac.layers import call_with, conditioned, mask_of, sampled_rows
    >>> class Transposed(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.weight = self.add_weight(shape=(4, input_shape[-1]))
    ...     def call(self, inputs):
    ...         return keras.ops.matmul(inputs, keras.ops.transpose(self.weight))
    >>> class TransposedAdapter:
    ...     def kernels(self, layer):
    ...         return [layer.weight]
    ...     def call(self, layer, conditioning_of, inputs):
    ...         conditioning = conditioning_of(layer.weight)
    ...         rows = sampled_rows(inputs, conditioning, mask_of(inputs))
    ...         matrix = keras.ops.transpose(keras.ops.convert_to_tensor(layer.weight))
    ...         weight = keras.ops.transpose(conditioned(matrix, conditioning, rows))
    ...         return call_with(layer, [(layer.weight, weight)], inputs)
    >>> register_adapter(Transposed, TransposedAdapter())
    >>> layer = capture_inputs(Transposed())
    """
    _check_class(layer_class)
    if not all(callable(getattr(adapter, name, None)) for name in ("kernels", "call")):
        raise TypeError(f"`adapter` must have the functions `kernels` and `call`. Received: adapter={adapter!r}")
    ADAPTERS[layer_class.call] = adapter


def _check_class(layer_class: Any) -> None:
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(f"`layer_class` must be a subclass of `keras.Layer`. Received: layer_class={layer_class!r}")
    # Layers are looked up by their `call` function. An inherited one is also that of other layers.
    if "call" not in vars(layer_class):
        owner = next(base for base in layer_class.__mro__ if "call" in vars(base))
        raise ValueError(
            f"{layer_class.__name__} inherits its `call` from {owner.__name__}, so that registering it would change that layer "
            f"too. Register {owner.__name__}, or write a `call` in {layer_class.__name__}, if only one that returns "
            f"`super().call(...)`. Received: layer_class={layer_class!r}"
        )


def adapter_of(layer: keras.Layer) -> Any:
    """Returns the adapter of `layer`, or `None` if its kind is not supported."""
    return ADAPTERS.get(type(layer).call)


def kernels_of(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the variables that the adapter of `layer` conditions.

    Leaves out a kernel that the layer computes, as weight normalization does: the conditioned gradient of the product is not a
    descent direction for the variables that it is computed from.
    """
    return [kernel for kernel in adapter_of(layer).kernels(layer) if isinstance(kernel, keras.Variable)]
