"""What a captured layer does: in an open scope, its adapter's call; elsewhere, its own."""

import contextlib
import weakref

from keras_isaac import backend, keras_hooks, scope
from keras_isaac.layers import adapter_of, kernels_of
from keras_isaac.selection import walk

# Layers that were captured by themselves. Models that hold them may be made later.
captured_alone: weakref.WeakSet = weakref.WeakSet()


def capture(layer):
    """Wraps the `call` of this layer, once; returns whether the layer can be conditioned."""
    if adapter_of(layer) is None:
        return False
    keras_hooks.wrap_call(layer, _captured_call)
    keras_hooks.keep_scope(layer)
    # Somebody else's `call` on the instance is not the layer that the adapter knows.
    return is_captured(layer)


def release(layer):
    """Takes back `capture`."""
    if is_captured(layer):
        keras_hooks.unwrap_call(layer)
    keras_hooks.drop_scope(layer)
    captured_alone.discard(layer)


def is_captured(layer):
    """Whether this layer's `call` is wrapped."""
    return keras_hooks.runs(layer, _captured_call)


@contextlib.contextmanager
def captured_throughout(root):
    """Captures every supported layer in `root` inside the `with` block, to see what it would do."""
    layers = [layer for layer, _ in walk(root) if adapter_of(layer) and "call" not in vars(layer)]
    for layer in layers:
        keras_hooks.wrap_call(layer, _captured_call)
    try:
        yield
    finally:
        for layer in layers:
            keras_hooks.unwrap_call(layer)


def _captured_call(layer, *args, **kwargs):
    if scope.is_open():
        adapter = adapter_of(layer)
        conditionings = {}
        for kernel in kernels_of(layer):
            conditioning = scope.conditioning_of(kernel)
            if conditioning is not None:
                conditioning.on_use()
                conditionings[id(kernel)] = conditioning.of_kernel(kernel)
        if conditionings:
            return adapter.call(layer, lambda kernel: conditionings.get(id(kernel)), *args, **kwargs)
    elif kwargs.get("training") is not False and backend.sees_step(args[0] if args else layer.variables[0]):
        scope.note_plain_call()
    return keras_hooks.own_call(layer)(layer, *args, **kwargs)
