"""How registered layers read as rows times a kernel."""

import functools
import inspect
import math

from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of
from keras_isaac.layers.products import conditioned, is_sparse, note_sparse


@functools.cache
def _first_argument(call):
    """Returns the name of the first argument of a `call` after the layer."""
    return list(inspect.signature(call).parameters)[1]


class RegisteredAdapter:
    """A registered layer: one function of rows per kernel, and the layer's own `call`."""

    def __init__(self, name):
        self.name, self.reads = name, {}

    def add(self, kernel, rows, groups=False):
        """Adds or replaces a kernel: an attribute, its function of rows, and whether its first axis is one of groups."""
        self.reads[kernel] = rows, groups
        return self

    def kernels(self, layer):
        """The named variables."""
        # "bank.weight" is an attribute of an attribute.
        return [functools.reduce(getattr, kernel.split("."), layer) for kernel in self.reads]

    def call(self, layer, conditioning_of, /, *args, **kwargs):
        """The layer's own `call`. Its first argument may have any name, be passed by keyword and be a nest of tensors."""
        inputs = args[0] if args else kwargs[_first_argument(type(layer).call)]
        values = []
        for variable, (name, (rows_of, groups)) in zip(self.kernels(layer), self.reads.items(), strict=True):
            conditioning = conditioning_of(variable)
            if conditioning is not None:
                rows = rows_of(layer, inputs)
                rows, mask = rows if isinstance(rows, tuple) else (rows, mask_of(inputs) if ops.is_tensor(inputs) else None)
                if is_sparse(rows):
                    note_sparse(layer, [conditioning])
                    continue
                values.append((variable, self._conditioned(layer, name, variable, rows, mask, groups, conditioning)))
        return call_with(layer, values, *args, **kwargs)

    def _conditioned(self, layer, name, variable, rows, mask, groups, conditioning):
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
        return ops.reshape(matrix, value.shape)
