"""`kernel_status`: which kernels of a model are conditioned, and why the others are plain."""

import contextlib
import math
from typing import NamedTuple

import keras

from keras_isaac.curvature.rows import SPARSE
from keras_isaac.keras_hooks import has_several, isaacs_in, quantization
from keras_isaac.layers import adapter_of, kernels_of
from keras_isaac.layers.products import is_sparse
from keras_isaac.selection import choice_of, walk


class KernelStatus(NamedTuple):
    """One kernel of a model. What only `summary` knows is `None` without it, and for kernels that it cannot read.

    Args:
        path: string, the variable's path.
        layer: string, the kind of its layer.
        reason: string, why it trains with its plain gradient, or `None` if it is conditioned under `ISAAC`.
        num_params: integer, its size.
        trainable: boolean, whether it trains.
        calls: integer, how often its layer is called in a step.
        groups: integer, how many independent kernels it is made of.
        rows: integer, how many input rows each of them multiplies in a call.
        num_in: integer, the features of a row.
        num_out: integer, the features of the product.
        form: string, the form in which it is conditioned: `"sample"`, by an inverse `[rows, rows]`; `"Woodbury"`, by one of
            `[num_sampled, num_sampled]`; `"feature"`, by one of `[num_in, num_in]`; `"diagonal"`, by a number for each token.
        num_sampled: integer, how many rows of a call are used.
        multiplications: integer, those of a plain training step: forward and, if it trains, two backward products.
        added: integer, the multiplications that conditioning adds.
        note: string, which part of a conditioned kernel stays plain, or `None`.
    """

    path: str
    layer: str
    reason: str | None
    num_params: int
    trainable: bool
    calls: int | None = None
    groups: int | None = None
    rows: int | None = None
    num_in: int | None = None
    num_out: int | None = None
    form: str | None = None
    num_sampled: int | None = None
    multiplications: int | None = None
    added: int | None = None
    note: str | None = None


def kernel_status(model: keras.Layer) -> list[KernelStatus]:
    """Lists the kernels of a built model, each with the reason if it is not conditioned.

    Kernels are the variables of two axes and more, and all others that a layer conditions; biases and scales always have
    their plain gradient. Of a captured model, these are the layers that its `capture_inputs` chooses. `summary` shows the rows
    of each kernel and the cost, too.

    Args:
        model: `keras.Model` or `keras.Layer`, built.

    Returns:
        List of `KernelStatus(path, layer, reason, ...)`, in the order of the layers.

    Raises:
        TypeError: if `model` is no model or layer.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs, kernel_status
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1, trainable=False)])
    >>> [status.reason for status in kernel_status(capture_inputs(model))]
    [None, 'frozen']
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            "`kernel_status` takes a `keras.Model` or a `keras.Layer`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    return list(statuses_of(model).values())


def statuses_of(model: keras.Layer) -> dict[int, KernelStatus]:
    """Returns the status of every kernel by the variable's id, in the order of the weights."""
    # By the variable's id: the variable, the innermost layer that holds it, and those that multiply their inputs by it.
    variables: dict[int, keras.Variable] = {}
    holders: dict[int, keras.Layer] = {}
    readers: dict[int, list[keras.Layer]] = {}
    for layer, containers in walk(model):
        for variable in layer.variables:
            variables.setdefault(id(variable), variable)
        inner = {id(variable) for below, _ in walk(layer) if below is not layer for variable in below.variables}
        holders.update({id(variable): layer for variable in layer.variables if id(variable) not in inner})
        for kernel in kernels_of(layer) if adapter_of(layer) and layer.built else ():
            others = [other for other in readers.get(id(kernel), ()) if other not in containers]
            readers[id(kernel)] = [*others, layer]
    optimizer = getattr(model, "optimizer", None)
    # One optimizer alone trains all that is trainable.
    training = [isaac.conditioning_of_step().trains for isaac in isaacs_in(optimizer)] if has_several(optimizer) else None
    chooses = choice_of(model)

    def status_of(variable: keras.Variable, layer: keras.Layer) -> KernelStatus:
        reason = _reason(variable, layer, id(variable) in readers)
        if reason is None and not chooses(layer):
            reason = "not captured"
        if reason is None and training is not None and not any(trains(variable) for trains in training):
            reason = "trained by another optimizer"
        adapter = adapter_of(layer)
        note = adapter.notes(layer).get(id(variable)) if reason is None and hasattr(adapter, "notes") else None
        num_params = math.prod(variable.shape)
        return KernelStatus(variable.path, type(layer).__name__, reason, num_params, variable.trainable, note=note)

    statuses = {}
    for key, variable in variables.items():
        # An attention layer's biases have two axes.
        if key in readers or (len(variable.shape) >= 2 and variable.name != "bias"):
            found = [status_of(variable, layer) for layer in readers.get(key, [holders[key]])]
            # Of the layers that share a kernel, report a conditioned one.
            statuses[key] = next((status for status in found if status.reason is None), found[-1])
    return statuses


def _reason(variable: keras.Variable, layer: keras.Layer, is_read: bool) -> str | None:
    """Returns why no `ISAAC` can condition this variable of a layer, or `None` if it can."""
    if not variable.trainable:
        return "frozen"
    adapter = adapter_of(layer)
    if adapter is None:
        return f"no conditioned form of {type(layer).__name__}"
    if not is_read and quantization(layer) is not None:
        return "quantized"
    if not is_read and len(kernels_of(layer)) < len(adapter.kernels(layer)):
        return "the layer computes its kernel from it"
    if not is_read:
        return "does not multiply the layer's inputs"
    if type(layer).call is keras.layers.Dense.call:
        # A layer outside a functional model has no `input`, nor has one that is called several times.
        with contextlib.suppress(AttributeError, ValueError):
            return SPARSE if is_sparse(layer.input) else None
    return None
