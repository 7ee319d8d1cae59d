"""How `EinsumDense` reads as rows times a kernel, by its equation.

The labels of an equation fall into four kinds: *groups* (in the inputs, the kernel and the output), *rows* (in the inputs and
the output), *contracted* (in the inputs and the kernel) and *outputs* (in the kernel and the output).
"""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_isaac.curvature.rows import sampled_rows
from keras_isaac.keras_hooks import call_with, mask_of, quantization
from keras_isaac.layers.products import (
    ConditioningOf,
    bias_and_activation,
    conditioned_matrices,
    conditioning_in_force,
    has_lora,
    main_kernels,
    product,
)


class EinsumDenseAdapter:
    """`EinsumDense`: rows, groups, inputs and outputs of the kernel are read off the equation."""

    def kernels(self, layer: Any) -> list[keras.Variable]:
        """The kernel, or LoRA's factors, if an axis of the inputs is contracted with it."""
        equation = _equation(layer.equation)
        # LoRA factors the last axis off the kernel, which must not be contracted with the inputs.
        is_factored = has_lora(layer) and equation.kernel[-1] not in equation.outputs
        return main_kernels(layer) if equation.is_product and not is_factored else []

    def call(self, layer: Any, conditioning_of: ConditioningOf, inputs: Any, training: bool | None = None) -> Any:
        """`EinsumDense.call`."""
        equation, kernels = _equation(layer.equation, len(inputs.shape)), main_kernels(layer)
        conditioning, mask = conditioning_in_force(kernels, conditioning_of), mask_of(inputs)
        value, *others = [ops.convert_to_tensor(kernel) for kernel in kernels]
        matrix, rows = equation.matrix_of(value), equation.rows_of(ops.convert_to_tensor(inputs, sparse=False))
        mask = None if mask is None else equation.mask_of(mask, inputs)
        if quantization(layer) is None and not others:
            products = product(rows, matrix, conditioning, mask, len(equation.groups))
            return bias_and_activation(layer, equation.output_of(products, value.shape))
        rows = sampled_rows(rows, conditioning, mask, len(equation.groups))
        matrix, *others = conditioned_matrices(kernels, [matrix, *others], conditioning_of, rows)
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
        self.rows = "".join(x for x in self.inputs if x not in self.kernel and x in self.output)
        self.contracted = "".join(x for x in self.inputs if x in self.kernel and x not in self.output)
        self.outputs = "".join(x for x in self.kernel if x not in self.inputs and x in self.output)
        groups = "".join(x for x in self.inputs if x in self.kernel and x in self.output)
        # All axes of groups become one, if there are any.
        self.groups = (groups,) if groups else ()

    @property
    def is_product(self) -> bool:
        """Whether the equation is a product of rows and a matrix, each axis named once."""
        operands = (self.inputs, self.kernel, self.output)
        named_once = all(len(set(operand)) == len(operand) for operand in operands)
        kernel_only = set(self.kernel) - set(self.inputs) - set(self.output)
        return named_once and not kernel_only and bool(self.rows) and bool(self.contracted)

    def rows_of(self, inputs: Any) -> Any:
        """Returns the inputs as `[(groups,) *rows, in]`, row axes in the order of the inputs."""
        labels = "".join(x for x in self.inputs if x in self.kernel or x in self.output)
        if labels != self.inputs:
            inputs = ops.sum(inputs, axis=[axis for axis, x in enumerate(self.inputs) if x not in labels])
        return _merged(inputs, labels, *self.groups, *self.rows, self.contracted)

    def mask_of(self, mask: Any, inputs: Any) -> Any:
        """Returns a mask of the inputs' first axes as `[(groups,) *rows]`, or `None` if one is neither group nor row."""
        labels = self.inputs[: len(mask.shape)]
        parts = (*self.groups, *self.rows) if any(x in part for part in self.groups for x in labels) else tuple(self.rows)
        wanted = "".join(parts)
        if any(x not in wanted for x in labels):
            return None
        rest = [x for x in wanted if x not in labels]
        mask = ops.reshape(mask, (*ops.shape(mask), *[1] * len(rest)))
        sizes, labels = dict(zip(self.inputs, ops.shape(inputs), strict=True)), labels + "".join(rest)
        return _merged(ops.broadcast_to(mask, [sizes[x] for x in labels]), labels, *parts)

    def matrix_of(self, kernel: Any) -> Any:
        """Returns the kernel as `[(groups,) in, out]`."""
        return _merged(kernel, self.kernel, *self.groups, self.contracted, self.outputs)

    def kernel_of(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """Returns a matrix of `matrix_of` in the kernel's `shape`."""
        sizes = dict(zip(self.kernel, shape, strict=True))
        return _split(matrix, (*self.groups, self.contracted, self.outputs), sizes, self.kernel)

    def output_of(self, products: Any, kernel_shape: tuple[int, ...]) -> Any:
        """Returns the products `[(groups,) *rows, out]` with the axes of the output."""
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))
        sizes.update(zip(self.rows, ops.shape(products)[len(self.groups) : -1], strict=True))
        return _split(products, (*self.groups, *self.rows, self.outputs), sizes, self.output)


def _merged(tensor: Any, labels: str, *parts: str) -> Any:
    """Returns a tensor with an axis for each part of its labels, the axes of a part merged in their order."""
    tensor = ops.transpose(tensor, [labels.index(x) for x in "".join(parts)])
    sizes = ops.shape(tensor)
    ends = list(itertools.accumulate(map(len, parts)))
    return ops.reshape(tensor, [math.prod(sizes[end - len(part) : end]) for end, part in zip(ends, parts, strict=True)])


def _split(tensor: Any, parts: Iterable[str], sizes: dict[str, Any], wanted: str) -> Any:
    """Returns a tensor of `_merged` with an axis for each label, in the order wanted."""
    labels = "".join(parts)
    return ops.transpose(ops.reshape(tensor, [sizes[x] for x in labels]), [labels.index(x) for x in wanted])


# Eager PyTorch reads a layer's equation in every step.
_equation = functools.lru_cache(maxsize=256)(Equation)
