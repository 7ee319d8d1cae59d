"""What is conditioned in a model, and why the rest is not."""

from typing import NamedTuple

from keras_isaac.capture import is_captured, walk
from keras_isaac.layers import adapter_of


class KernelStatus(NamedTuple):
    """One kernel of a model.

    Args:
        path: string, the variable's path.
        layer: string, the kind of its layer.
        reason: string, why it trains with its plain gradient, or `None` if it is conditioned under `ISAAC`.
    """

    path: str
    layer: str
    reason: str | None


def kernel_status(model):
    """Lists the kernels of a built model, and says of each whether it is conditioned or why it is plain.

    Kernels are the variables of two axes and more, with those that a conditioned layer names; biases and scales always have
    their plain gradient.

    Args:
        model: `keras.Model` or `keras.Layer`, built.

    Returns:
        List of `KernelStatus(path, layer, reason)`, in the order of the layers.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs, kernel_status
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1, trainable=False)])
    >>> [status.reason for status in kernel_status(capture_inputs(model))]
    [None, 'frozen']
    """
    statuses = []
    for layer, _ in walk(model):
        inner = {id(variable) for below, _ in walk(layer) if below is not layer for variable in below.variables}
        adapter = adapter_of(layer)
        kernels = {id(kernel) for kernel in adapter.kernels(layer)} if adapter and layer.built else set()
        for variable in layer.variables:
            # An attention layer's biases have two axes.
            is_kernel = id(variable) in kernels or (len(variable.shape) >= 2 and variable.name != "bias")
            if id(variable) not in inner and is_kernel:
                reason = _reason(layer, adapter, variable, id(variable) in kernels)
                statuses.append(KernelStatus(variable.path, type(layer).__name__, reason))
    order = {id(weight): place for place, weight in enumerate(model.weights)}
    by_path = {weight.path: order[id(weight)] for weight in model.weights}
    return sorted(statuses, key=lambda status: by_path.get(status.path, len(order)))


def _reason(layer, adapter, variable, is_read):
    if not variable.trainable:
        return "frozen"
    if getattr(layer, "quantization_mode", None) is not None:
        return "quantized"
    if adapter is None:
        return f"no conditioned form of {type(layer).__name__}"
    if not is_read:
        return "does not meet the layer's inputs in a product"
    return None if is_captured(layer) else "not captured"
