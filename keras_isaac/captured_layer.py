"""The `call` of a captured layer: conditioned if the innermost scope that trains a kernel of it chooses it, else plain."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_isaac import backend, keras_hooks, scope
from keras_isaac.layers import adapter_of
from keras_isaac.selection import walk

# The layers that were captured alone, for training loops.
captured_alone: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
# The `CapturedModel`s of the models that captured each layer. They live as long as the models do.
_models: weakref.WeakKeyDictionary[keras.Layer, weakref.WeakSet] = weakref.WeakKeyDictionary()


def capture(layer: keras.Layer, model: Any = None) -> bool:
    """Wraps the `call` of this layer once, for a `CapturedModel` or alone; returns whether the layer can be conditioned."""
    keras_hooks.keep_scope(layer)
    if adapter_of(layer) is None:
        if backend.untraced(type(layer).call) is not None:
            keras_hooks.wrap_call(layer, _traced_call)
        return False
    if not keras_hooks.wrap_call(layer, _captured_call):
        return False
    if model is None:
        captured_alone.add(layer)
    else:
        _models.setdefault(layer, weakref.WeakSet()).add(model)
    return True


def is_chosen(layer: keras.Layer) -> bool:
    """Returns whether this layer is conditioned in a custom training loop: captured alone, or chosen by a living model."""
    return layer in captured_alone or any(model.chooses(layer) for model in _models.get(layer, ()))


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
        scope.plain_calls.add("called")
    return keras_hooks.own_call(layer)(layer, *args, **kwargs)


def _traced_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    """Runs the `call` of a layer that is a `tf.function`: the layers in it may have been traced outside of the scope."""
    function = (backend.untraced(type(layer).call) if scope.is_open() else None) or type(layer).call
    return function(layer, *args, **kwargs)
