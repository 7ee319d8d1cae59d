"""The `call` of a captured layer: conditioned if the innermost scope that trains a kernel of it chooses it, else plain."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import keras

from keras_isaac import backend, keras_hooks, scope
from keras_isaac.layers import adapter_of
from keras_isaac.selection import walk


class Chooser(Protocol):
    """What captures layers: a model, or `capture_inputs` of a layer."""

    def chooses(self, layer: keras.Layer) -> bool:
        """Returns whether this layer is to be conditioned."""


# What captured each layer. A model is known by its `CapturedModel`, which lives as long as the model does.
_choosers: weakref.WeakKeyDictionary[keras.Layer, weakref.WeakSet] = weakref.WeakKeyDictionary()


def capture(layer: keras.Layer, chooser: Chooser) -> bool:
    """Wraps the `call` of this layer once; returns whether the layer can be conditioned."""
    keras_hooks.keep_scope(layer)
    if adapter_of(layer) is None:
        if backend.untraced(type(layer).call) is not None:
            keras_hooks.wrap_call(layer, _traced_call)
        return False
    keras_hooks.wrap_call(layer, _captured_call)
    _choosers.setdefault(layer, weakref.WeakSet()).add(chooser)
    return is_captured(layer)


def release(layer: keras.Layer, chooser: Chooser) -> None:
    """Forgets that `chooser` captured this layer. Its `call` stays wrapped, which does nothing by itself."""
    _choosers.get(layer, weakref.WeakSet()).discard(chooser)


def is_captured(layer: keras.Layer) -> bool:
    """Returns whether the layer's `call` is wrapped. It is not if its `call` was replaced by other code before."""
    return keras_hooks.runs(layer, _captured_call)


def is_chosen(layer: keras.Layer) -> bool:
    """Returns whether this layer is conditioned in a custom training loop: captured alone, or chosen by a living model."""
    return any(chooser.chooses(layer) for chooser in _choosers.get(layer, ()))


def choice_of(model: keras.Layer) -> Callable[[keras.Layer], bool]:
    """Returns the function that says which layers are conditioned when this model, or layer, trains."""
    owner = keras_hooks.owner_of(model)
    return is_chosen if owner is None or not owner.is_captured else owner.chooses


@contextlib.contextmanager
def captured_throughout(root: keras.Layer) -> Iterator[None]:
    """Wraps every supported layer in `root` inside the `with` block, to see what it would do."""
    layers = [layer for layer, _ in walk(root) if adapter_of(layer) and "call" not in vars(layer)]
    for layer in layers:
        keras_hooks.wrap_call(layer, _captured_call)
    try:
        yield
    finally:
        for layer in layers:
            keras_hooks.unwrap_call(layer)


def _captured_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    if scope.is_open():
        adapter, conditionings = adapter_of(layer), {}
        for kernel in adapter.kernels(layer):
            # A kernel that the layer computes is no variable. See `kernels_of`.
            conditioning = scope.conditioning_of(kernel) if isinstance(kernel, keras.Variable) else None
            if conditioning is not None and conditioning.chooses(layer):
                conditioning.on_use()
                if conditioning.record is not None or conditioning.output_damping is not None:
                    conditioning = conditioning.of_kernel(kernel)
                conditionings[id(kernel)] = conditioning
        if conditionings:
            return adapter.call(layer, lambda kernel: conditionings.get(id(kernel)), *args, **kwargs)
    elif scope.is_recomputed_outside() and is_chosen(layer):
        raise ValueError(
            f"Call `loss.backward()` inside `with optimizer.conditioning():`. It recomputes layer '{layer.path}' "
            "(`torch.utils.checkpoint`), which is conditioned only inside of that block."
        )
    elif (
        kwargs.get("training") is not False and backend.is_tracing(args[0] if args else layer.variables[0]) and is_chosen(layer)
    ):
        scope.note_plain_call()
    return keras_hooks.own_call(layer)(layer, *args, **kwargs)


def _traced_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    """Runs the `call` of a layer that is a `tf.function`: the layers in it may have been traced outside of the scope."""
    function = (backend.untraced(type(layer).call) if scope.is_open() else None) or type(layer).call
    return function(layer, *args, **kwargs)
