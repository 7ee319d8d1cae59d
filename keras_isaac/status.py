"""`kernel_status`: which kernels of a model are conditioned, and why the others are plain."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_isaac.captured_layer import choice_of, is_captured
from keras_isaac.curvature.record import SPARSE
from keras_isaac.keras_hooks import quantization
from keras_isaac.layers import adapter_of, kernels_of
from keras_isaac.layers.dense import DenseAdapter
from keras_isaac.layers.products import is_sparse
from keras_isaac.optimizer_wrapper import has_several, isaacs_in
from keras_isaac.selection import walk


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
        side: string, the form in which it is conditioned: `"sample"`, by an inverse `[rows, rows]`; `"Woodbury"`, by one of
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
    side: str | None = None
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
    optimizer = getattr(model, "optimizer", None)
    # One optimizer alone trains all that is trainable.
    training = [isaac.conditioning_of_step().trains for isaac in isaacs_in(optimizer)] if has_several(optimizer) else []
    chooses = choice_of(model)
    statuses: dict[int, KernelStatus] = {}
    readers: dict[int, keras.Layer] = {}
    for layer, _ in walk(model):
        # The layer around a cell reads the cell's kernels. A layer comes after those that contain it.
        if adapter_of(layer) and layer.built:
            readers.update({id(kernel): layer for kernel in kernels_of(layer)})
    for layer, _ in walk(model):
        inner = {id(variable) for below, _ in walk(layer) if below is not layer for variable in below.variables}
        for variable in layer.variables:
            is_own, is_read = readers.get(id(variable)) is layer, id(variable) in readers
            # An attention layer's biases have two axes.
            is_kernel = is_read or (len(variable.shape) >= 2 and variable.name != "bias")
            if is_own or (id(variable) not in inner and is_kernel):
                reader = layer if adapter_of(layer) else readers.get(id(variable), layer)
                adapter = adapter_of(reader)
                reason = _reason(reader, adapter, variable, is_read, chooses, training)
                note = adapter.notes(reader).get(id(variable)) if reason is None and hasattr(adapter, "notes") else None
                size = math.prod(variable.shape)
                status = KernelStatus(variable.path, type(reader).__name__, reason, size, variable.trainable, note=note)
                # Of the layers that share a kernel, report a conditioned one.
                if reason is None or id(variable) not in statuses:
                    statuses[id(variable)] = status
    order = {id(weight): place for place, weight in enumerate(model.weights)}
    return dict(sorted(statuses.items(), key=lambda item: order.get(item[0], len(order))))


def _reason(
    layer: keras.Layer,
    adapter: Any,
    variable: keras.Variable,
    is_read: bool,
    chooses: Callable[[keras.Layer], bool],
    training: Sequence[Callable[[keras.Variable], bool]],
) -> str | None:
    if not variable.trainable:
        return "frozen"
    if adapter is None:
        return f"no conditioned form of {type(layer).__name__}"
    if not is_read and quantization(layer) is not None:
        return "quantized"
    if not is_read and len(kernels_of(layer)) < len(adapter.kernels(layer)):
        return "the layer computes its kernel from it"
    if not is_read:
        return "does not multiply the layer's inputs"
    if reads_sparse_inputs(layer):
        return SPARSE
    if not (is_captured(layer) and chooses(layer)):
        return "not captured"
    if training and not any(trains(variable) for trains in training):
        return "trained by another optimizer"
    return None


def reads_sparse_inputs(layer: keras.Layer) -> bool:
    """Returns whether a functional model calls this `Dense` on sparse inputs, which leave its kernel plain."""
    if adapter_of(layer) is not DenseAdapter:
        return False
    # A layer outside a functional model has no `input`, nor has one that is called several times.
    with contextlib.suppress(AttributeError, ValueError):
        return is_sparse(layer.input)
    return False
