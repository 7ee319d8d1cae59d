"""How recurrent layers read as rows times a kernel.

A cell's kernel multiplies the inputs of every time step, and its recurrent kernel multiplies the state before every step.
Each step adds to the gradient of both, and the sum is conditioned, once. The states are known only after the layer's call, so
that a recurrent kernel is conditioned late (`conditioned_late`).
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.operations import conditioned, conditioned_late
from keras_isaac.curvature.rows import Rows, sampled_rows
from keras_isaac.keras_hooks import call_with, with_attributes
from keras_isaac.layers.convolution import channels_last, window_of
from keras_isaac.layers.patches import Window, patch_rows
from keras_isaac.layers.products import ConditioningOf, Pairs
from keras_isaac.scope import Conditioning

_CELLS = {cell.call for cell in (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)}


class RNNAdapter:
    """`SimpleRNN`, `LSTM`, `GRU`, `ConvLSTM`, and `RNN` of their cells: a row is an input or a state at a step, or a patch."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The kernel and the recurrent kernel of each cell."""
        return [kernel for cell in _cells(layer) for kernel in (cell.kernel, cell.recurrent_kernel)]

    def notes(self, layer: Any) -> dict[int, str]:
        """Which part of a kernel is plain, by the kernel's id."""
        note = "candidate block plain: a gate multiplies its rows"
        return {id(cell.recurrent_kernel): note for cell in _cells(layer) if _columns_of_states(cell) is not None}

    def call(
        self,
        layer: Any,
        conditioning_of: ConditioningOf,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool = False,
    ) -> Any:
        """The layer's own `call`, its kernels conditioned."""
        step_mask = None if mask is None else ops.cast(keras.tree.flatten(mask)[0], "bool")
        read = _read_stack if isinstance(layer.cell, keras.layers.StackedRNNCells) else _read_cell
        values, inner_loop = read(layer, conditioning_of, sequences, step_mask, training)
        # The states of a stateful layer are not among its variables.
        values += [(state, state.value) for state in keras.tree.flatten(layer.states or [])]
        with with_attributes(layer, inner_loop=inner_loop):
            return call_with(layer, values, sequences, initial_state=initial_state, mask=mask, training=training)


class BidirectionalAdapter:
    """`Bidirectional`: each of its two layers is conditioned by itself."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """Those of the two layers."""
        both = (layer.forward_layer, layer.backward_layer)
        return [kernel for each in both if isinstance(each, keras.layers.RNN) for kernel in RNNAdapter().kernels(each)]

    def call(self, layer: Any, conditioning_of: ConditioningOf, *args: Any, **kwargs: Any) -> Any:
        """The layer's own `call`."""
        # On a GPU, Keras may skip both layers and run their kernels in one operation, but not if they are stateful.
        with with_attributes(layer, stateful=True):
            return type(layer).call(layer, *args, **kwargs)


def _cells(layer: Any) -> list[Any]:
    """Returns the cells of a layer that are of a known kind."""
    if _is_convolution(layer):
        return [layer.cell]
    cells = layer.cell.cells if isinstance(layer.cell, keras.layers.StackedRNNCells) else [layer.cell]
    return [cell for cell in cells if getattr(type(cell), "call", None) in _CELLS]


def _is_convolution(layer: keras.Layer) -> bool:
    return type(layer).call is keras.layers.ConvLSTM2D.call


def _columns_of_states(cell: Any) -> int | None:
    """Returns how many columns of the recurrent kernel multiply states, and not gated states; `None` for all."""
    return None if getattr(cell, "reset_after", True) else 2 * cell.units


def _read_cell(
    layer: Any, conditioning_of: ConditioningOf, sequences: Any, mask: Any, training: bool | None
) -> tuple[Pairs, Callable[..., Any]]:
    """Returns the values of the kernels of a layer of one cell, and the `inner_loop` that they need.

    Args:
        layer: a layer of one cell.
        conditioning_of: function of a kernel, as in `RNNAdapter.call`.
        sequences: tensor `[samples, steps, ...]`.
        mask: tensor `[samples, steps]`, true where a step is valid, or `None`.
        training: boolean or `None`.
    """
    cell, values = layer.cell, []
    conditioning = conditioning_of(cell.kernel)
    if conditioning is not None:
        # The call draws this mask first, and reuses one that was drawn before.
        dropout = cell.get_dropout_mask(sequences[:, 0]) if training else None
        rows = _rows_of(_dropped(sequences, dropout), conditioning, mask, layer)
        value = ops.convert_to_tensor(cell.kernel)
        matrix = conditioned(ops.reshape(value, (-1, value.shape[-1])), conditioning, rows)
        values.append((cell.kernel, ops.reshape(matrix, value.shape)))
    conditioning = conditioning_of(cell.recurrent_kernel)
    if conditioning is None:
        return values, layer.inner_loop
    state_mask = _mask_of_states(mask, layer.go_backwards)
    rows_of = functools.partial(_rows_of, conditioning=conditioning, mask=state_mask, layer=layer, of_states=True)
    is_convolution = _is_convolution(layer)
    state_shape = cell.compute_output_shape((None, *sequences.shape[2:]))[0][1:] if is_convolution else (cell.units,)
    shape = (*ops.shape(sequences)[:2], *state_shape)
    recurrent, bring = conditioned_late(cell.recurrent_kernel, conditioning, shape, rows_of, _columns_of_states(cell))
    values.append((cell.recurrent_kernel, recurrent))

    def inner_loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        with with_attributes(layer, return_sequences=True):
            results = type(layer).inner_loop(layer, sequences, initial_state, mask, training=training)
        first, outputs = keras.tree.flatten(initial_state)[0], results[1]
        states = ops.concatenate([first[:, None], ops.cast(outputs, first.dtype)[:, :-1]], axis=1)
        dropout = cell.get_recurrent_dropout_mask(first) if training else None
        return bring(results, _dropped(states, dropout))

    return values, inner_loop


def _read_stack(
    layer: Any, conditioning_of: ConditioningOf, sequences: Any, mask: Any, training: bool | None
) -> tuple[Pairs, Callable[..., Any]]:
    """As `_read_cell`, for `StackedRNNCells`: each output of the loop holds the inputs of its cells too."""
    stack, values, late, width = layer.cell, [], [], 0
    cells = _cells(layer)
    if mask is not None and layer.go_backwards:
        mask = ops.flip(mask, axis=1)
    for cell in cells:
        for kernel, num_in, columns in (
            (cell.kernel, cell.kernel.shape[0], None),
            (cell.recurrent_kernel, cell.units, _columns_of_states(cell)),
        ):
            conditioning = conditioning_of(kernel)
            if conditioning is not None:
                rows_of = functools.partial(sampled_rows, conditioning=conditioning, mask=mask)
                shape = (*ops.shape(sequences)[:2], num_in)
                value, bring = conditioned_late(kernel, conditioning, shape, rows_of, columns)
                values.append((kernel, value))
                late.append((bring, slice(width, width + num_in)))
            width += num_in

    def inner_loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        read = []

        def call_cell(cell: Any, inputs: Any, states: Sequence[Any], training: bool = False) -> tuple[Any, Any]:
            for tensor, dropout in ((inputs, cell.get_dropout_mask), (states[0], cell.get_recurrent_dropout_mask)):
                read.append(ops.cast(_dropped(tensor, dropout(tensor) if training else None), inputs.dtype))
            return type(cell).call(cell, inputs, states, training=training)

        # At masked steps, Keras repeats the previous output: on JAX the first state, which therefore holds the output.
        def call_stack(inputs: Any, states: Sequence[Any], **kwargs: Any) -> tuple[Any, list[Any]]:
            read.clear()
            output, new_states = type(stack).call(stack, inputs, states[1:], **kwargs)
            output = ops.concatenate([output, *(ops.cast(each, output.dtype) for each in read)], axis=-1)
            return output, [output, *keras.tree.pack_sequence_as(list(states[1:]), keras.tree.flatten(new_states))]

        first = keras.tree.flatten(initial_state[-1])[0]
        first = ops.pad(first, [(0, 0), (0, width)])
        with contextlib.ExitStack() as instances:
            instances.enter_context(with_attributes(stack, call=call_stack))
            for cell in cells:
                instances.enter_context(with_attributes(cell, call=functools.partial(call_cell, cell)))
            instances.enter_context(with_attributes(layer, return_sequences=True))
            last_output, outputs, states = type(layer).inner_loop(
                layer, sequences, [first, *initial_state], mask, training=training
            )
        num_out = outputs.shape[-1] - width
        found = outputs[..., num_out:]
        results = last_output[..., :num_out], outputs[..., :num_out], states[1:]
        for bring, part in late:
            results = bring(results, found[..., part])
        return results

    return values, inner_loop


def _rows_of(inputs: Any, conditioning: Conditioning, mask: Any, layer: Any, of_states: bool = False) -> Rows:
    """Returns the rows of the inputs, or of the states, of all steps of a layer of one cell."""
    cell = layer.cell
    if not _is_convolution(layer):
        return sampled_rows(inputs, conditioning, mask)
    # The convolution of the states has neither strides nor dilation.
    ones = (1,) * cell.rank
    window = Window(cell.kernel_size, ones, ones, "same") if of_states else window_of(cell)
    return patch_rows(channels_last(cell, inputs, axis=2), conditioning, mask, window)


def _mask_of_states(mask: Any, go_backwards: bool) -> Any:
    """Returns which of the initial state and all outputs but the last are inputs of the kernel in a valid step.

    An output is one if its step is valid and so is a later one. Between the two, masked steps keep the state as it is.
    """
    if mask is None:
        return None
    mask = ops.cast(ops.flip(mask, axis=1) if go_backwards else mask, "int32")
    total = ops.sum(mask, axis=1, keepdims=True)
    is_input = (mask > 0) & (ops.cumsum(mask, axis=1) < total)
    return ops.concatenate([total > 0, is_input[:, :-1]], axis=1)


def _dropped(tensor: Any, mask: Any) -> Any:
    """Returns inputs or states after dropout if all gates share a mask; unchanged for a list of masks, one for each gate."""
    if mask is None or isinstance(mask, (list, tuple)):
        return tensor
    return tensor * (mask if len(mask.shape) == len(tensor.shape) else mask[:, None])
