"""How `EinsumDense` reads as rows times a kernel, by its equation.

The labels of an equation fall into four kinds: *groups* (in the inputs, the kernel and the output), *rows* (in the inputs and
the output), *contracted* (in the inputs and the kernel) and *outputs* (in the kernel and the output).
"""

import functools
import math
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, quantization
from keras_isaac.layers.lora import conditioned_factors, has_lora, main_kernels
from keras_isaac.layers.products import (
    ConditioningOf,
    as_dense,
    bias_and_activation,
    conditioned,
    conditioning_in_force,
    product,
)


class EinsumDenseAdapter:
    """`EinsumDense`: rows, groups, inputs and outputs of the kernel are read off the equation."""

    @staticmethod
    def kernels(layer: Any) -> list[keras.Variable]:
        """The kernel, or LoRA's factors, if an axis of the inputs is contracted with it."""
        equation = _equation(layer.equation)
        # LoRA factors the last axis off the kernel, which must not be contracted with the inputs.
        is_factored = has_lora(layer) and equation.kernel[-1] not in equation.outputs
        return main_kernels(layer) if equation.is_product and not is_factored else []

    @staticmethod
    def call(layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None) -> Any:
        """`EinsumDense.call`."""
        equation = _equation(layer.equation, len(inputs.shape))
        kernels = EinsumDenseAdapter.kernels(layer)
        conditioning = conditioning_in_force(kernels, conditioning_of)
        value, mask = ops.convert_to_tensor(kernels[0]), mask_of(inputs)
        matrix, rows = equation.matrix_of(value), equation.rows_of(as_dense(inputs))
        mask = None if mask is None else equation.mask_of(mask, inputs)
        if quantization(layer) is None and not has_lora(layer):
            products = product(rows, matrix, conditioning, mask, equation.num_groups)
            return bias_and_activation(layer, equation.output_of(products, value.shape))
        rows = sampled_rows(rows, conditioning, mask, equation.num_groups)
        others: list[Any] = []
        if has_lora(layer):
            matrices = matrix, ops.convert_to_tensor(kernels[1])
            matrix, *others = conditioned_factors(kernels, matrices, conditioning_of, rows)
        else:
            matrix = conditioned(matrix, conditioning, rows)
        values = zip(kernels, (equation.kernel_of(matrix, value.shape), *others), strict=True)
        return call_with(layer, values, inputs, training=training)


class Equation:
    """The reading of one equation.

    Args:
        equation: string, such as `"abc,cde->abde"` or `"...x,xy->...y"`.
        input_ndim: integer, the rank of the inputs, which determines the number of axes of an ellipsis. Defaults to `None`: at
            least one.
    """

    def __init__(self, equation: str, input_ndim: int | None = None) -> None:
        operands, output = equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        num_ellipsis = 1 if input_ndim is None else input_ndim - len(inputs.replace("...", ""))
        # An ellipsis's axes get names that no equation can contain.
        ellipsis = "".join(chr(0x100 + axis) for axis in range(num_ellipsis))
        self.inputs, self.kernel, self.output = (part.replace("...", ellipsis) for part in (inputs, kernel, output))
        self.groups = [x for x in self.inputs if x in self.kernel and x in self.output]
        self.rows = [x for x in self.inputs if x not in self.kernel and x in self.output]
        self.contracted = [x for x in self.inputs if x in self.kernel and x not in self.output]
        self.outputs = [x for x in self.kernel if x not in self.inputs and x in self.output]
        self.num_groups = 1 if self.groups else 0

    @property
    def is_product(self) -> bool:
        """Whether the equation is a product of rows and a matrix, each axis named once."""
        operands = (self.inputs, self.kernel, self.output)
        named_once = all(len(set(operand)) == len(operand) for operand in operands)
        kernel_only = set(self.kernel) - set(self.inputs) - set(self.output)
        return named_once and not kernel_only and bool(self.rows) and bool(self.contracted)

    def rows_of(self, inputs: Any) -> Any:
        """Returns the inputs as `[(groups,) *rows, in]`, row axes in the order of the inputs."""
        labels = list(self.inputs)
        summed = [x for x in labels if x not in self.kernel and x not in self.output]
        if summed:
            inputs = ops.sum(inputs, axis=[labels.index(x) for x in summed])
            labels = [x for x in labels if x not in summed]
        inputs = ops.transpose(inputs, [labels.index(x) for x in (*self.groups, *self.rows, *self.contracted)])
        shape = ops.shape(inputs)
        rows = shape[len(self.groups) : len(self.groups) + len(self.rows)]
        return ops.reshape(inputs, (*self._group_shape(shape), *rows, math.prod(shape[len(shape) - len(self.contracted) :])))

    def mask_of(self, mask: Any, inputs: Any) -> Any:
        """Returns a mask of the inputs' first axes as `[(groups,) *rows]`, or `None` if one is neither group nor row."""
        labels = list(self.inputs[: len(mask.shape)])
        wanted = [*self.groups, *self.rows] if any(label in self.groups for label in labels) else self.rows
        if any(label not in wanted for label in labels):
            return None
        shape = ops.shape(inputs)
        sizes = dict(zip(self.inputs, shape, strict=True))
        rest = [label for label in wanted if label not in labels]
        mask = ops.reshape(mask, (*ops.shape(mask), *(1 for _ in rest)))
        mask = ops.transpose(mask, [(*labels, *rest).index(label) for label in wanted])
        mask = ops.broadcast_to(mask, [sizes[label] for label in wanted])
        if wanted is self.rows:
            return mask
        rows = [sizes[label] for label in self.rows]
        return ops.reshape(mask, (math.prod(sizes[label] for label in self.groups), *rows))

    def matrix_of(self, kernel: Any) -> Any:
        """Returns the kernel as `[(groups,) in, out]`."""
        kernel = ops.transpose(kernel, [self.kernel.index(x) for x in self._matrix_labels()])
        shape = kernel.shape
        num_in = math.prod(shape[len(self.groups) : len(self.groups) + len(self.contracted)])
        return ops.reshape(kernel, (*self._group_shape(shape), num_in, math.prod(shape[len(shape) - len(self.outputs) :])))

    def kernel_of(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """Returns a matrix of `matrix_of` in the kernel's `shape`."""
        labels = self._matrix_labels()
        matrix = ops.reshape(matrix, [shape[self.kernel.index(x)] for x in labels])
        return ops.transpose(matrix, [labels.index(x) for x in self.kernel])

    def output_of(self, products: Any, kernel_shape: tuple[int, ...]) -> Any:
        """Returns the products `[(groups,) *rows, out]` with the axes of the output."""
        labels = [*self.groups, *self.rows, *self.outputs]
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))
        sizes.update(zip(self.rows, ops.shape(products)[self.num_groups : -1], strict=True))
        products = ops.reshape(products, [sizes[x] for x in labels])
        return ops.transpose(products, [labels.index(x) for x in self.output])

    def _matrix_labels(self) -> list[str]:
        return [*self.groups, *self.contracted, *self.outputs]

    def _group_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return (math.prod(shape[: len(self.groups)]),) if self.groups else ()


# Cached, since eager PyTorch reads a layer's equation in every step.
_equation = functools.lru_cache(maxsize=256)(Equation)
