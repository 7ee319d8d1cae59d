"""How registered layers read as rows times a kernel."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.operations import conditioned
from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of
from keras_isaac.layers.products import ConditioningOf, is_sparse, note_sparse


class RegisteredAdapter:
    """A registered layer: one function of rows per kernel, and the layer's own `call`."""

    def __init__(self, name: str, **reads: tuple[Callable[[Any, Any], Any], bool]) -> None:
        self.name = name
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
                    f"The rows registered for {self.name} layer '{layer.path}' do not fit its kernel: {axes} "
                    "must be the product of the kernel's first axes. "
                    f"Received: rows of shape {tuple(rows.shape)}, `{name}` of shape {tuple(value.shape)}"
                )
            matrix = ops.reshape(value, (*group_shape, num_in, -1))
            matrix = conditioned(matrix, conditioning, sampled_rows(rows, conditioning, mask, num_groups))
            values.append((variable, ops.reshape(matrix, value.shape)))
        return call_with(layer, values, *args, **kwargs)
