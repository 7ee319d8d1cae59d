"""The rows that a gradient is conditioned on: all of a layer's inputs, sums of them, or means over positions.

Inputs are `[*groups, samples, *positions, features]`; rows are `[*groups, rows, features]`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_isaac import backend
from keras_isaac.curvature import plan
from keras_isaac.scope import Conditioning

_GOLDEN = (5**0.5 - 1) / 2
# Keras' default batch size, assumed for the cost if the batch size is unknown while tracing.
_DEFAULT_BATCH_SIZE = 32
# The `reason` of calls on sparse inputs.
SPARSE = "sparse inputs"


class Rows(NamedTuple):
    """Rows that a gradient is conditioned on.

    Args:
        values: tensor `[*groups, rows, in]`, zero where masked. `valuesᵀ values` estimates `num_sampled` times the mean of xxᵀ.
        num_sampled: the number of valid rows that `values` were computed from, an integer or a tensor that broadcasts to
            `[*groups, 1, 1]`.
        num_valid: the number of valid rows of the layer, likewise.
        num_total: integer, the number of rows of the layer, masked ones included, for the cost. `None` if unknown while
            tracing.
        is_shared: boolean, whether positions share the kernel.
    """

    values: Any
    num_sampled: Any
    num_valid: Any
    num_total: int | None = None
    is_shared: bool = False

    def of(self, values: Any) -> "Rows":
        """Returns other values with the same counts."""
        # `torch.compile` breaks its graph after a `_replace`, which changes a dictionary.
        return Rows(values, *self[1:])


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A kernel `[*groups, in, out]`, and the rows it multiplies in one call of its layer.

    Args:
        shape: tuple, the shape of the kernel's matrix, `(*groups, in, out)`.
        rows: the `Rows` that the gradient is conditioned on, or `None` for a table of tokens.
        has_product: boolean, whether `rows` are all rows of one product, whose gradient the backward pass computes.
        num_output_rows: integer, how many rows of that gradient condition the output side, or `None`.
        num_tokens: integer, how many tokens are looked up in a table, or `None` if unknown while tracing.
        frequency: tensor `[in]`, for a table: the share of each token.
        damping: scalar tensor, for a table: the damping that is added to the shares.
        reason: string, why this call leaves the kernel's gradient plain, or `None`. Nothing else is known of such a call.
    """

    shape: tuple[Any, ...]
    rows: Rows | None = None
    has_product: bool = False
    num_output_rows: int | None = None
    num_tokens: int | None = None
    frequency: Any = None
    damping: Any = None
    reason: str | None = None

    @property
    def num_rows(self) -> int | None:
        """How many rows the gradient is conditioned on, or `None` if unknown while tracing."""
        return self.num_tokens if self.rows is None else self.rows.values.shape[-2]

    @property
    def num_total(self) -> int | None:
        """How many rows the kernel multiplies, or `None` if unknown while tracing."""
        return self.num_tokens if self.rows is None else self.rows.num_total

    @property
    def num_in(self) -> int:
        """The number of features of a row."""
        return self.shape[-2]

    @property
    def num_out(self) -> int:
        """The number of features of a product."""
        return self.shape[-1]


def sampled_rows(inputs: Any, conditioning: Conditioning, mask: Any = None, num_groups: int = 0) -> Rows:
    """Returns the `Rows` of a layer's inputs: all of a plain batch, a part of them where positions share the kernel.

    Args:
        inputs: tensor `[*groups, samples, *positions, features]`.
        conditioning: the `Conditioning` in force, for `weight_sharing` and `max_rows`.
        mask: tensor `[samples, *positions]`, with or without the groups in front, true where a position is valid, or `None`.
        num_groups: how many leading axes are groups.
    """
    is_shared = len(inputs.shape) > num_groups + 2
    num_total = expected_total(inputs.shape[num_groups:-1])
    if mask is None and not is_shared:
        return product_rows(inputs, conditioning, is_shared, num_total)
    shape = ops.shape(inputs)
    groups, samples, num_features = shape[:num_groups], shape[num_groups], shape[-1]
    # All sizes are given, since `reshape` cannot infer one in an empty batch.
    positions = math.prod(shape[num_groups + 1 : -1])
    if mask is not None:
        mask_groups = groups if len(mask.shape) == len(inputs.shape) - 1 else ()
        # In float32: a bfloat16 cannot count to a thousand.
        mask = ops.cast(ops.reshape(mask, (*mask_groups, samples, positions, 1)), "float32")
    if conditioning.weight_sharing == "reduce" and is_shared:
        inputs = ops.reshape(inputs, (*groups, samples, positions, num_features))
        if mask is None:
            rows = ops.mean(inputs, axis=-2)
        else:
            lengths = ops.sum(mask, axis=-2)
            rows = ops.sum(inputs * ops.cast(mask, inputs.dtype), axis=-2)
            rows = rows / ops.cast(backend.clip(lengths, 1), rows.dtype)
            mask = ops.cast(lengths > 0, "float32")
    else:
        rows = ops.reshape(inputs, (*groups, samples * positions, num_features)) if is_shared else inputs
        mask = None if mask is None else ops.reshape(mask, (*mask_groups, samples * positions, 1))
    if mask is None:
        return product_rows(rows, conditioning, is_shared, num_total)
    num_valid = ops.sum(mask, axis=(-2, -1), keepdims=True)
    if is_shared:
        rows, mask = subsample(rows, num_read(conditioning)), subsample(mask, num_read(conditioning))
    num_sampled = ops.sum(mask, axis=(-2, -1), keepdims=True)
    return Rows(rows * ops.cast(mask, rows.dtype), num_sampled, num_valid, num_total, is_shared)


def product_rows(values: Any, conditioning: Conditioning, is_shared: bool, num_total: int | None) -> Rows:
    """Returns the `Rows` of a matrix `[*groups, rows, in]`, all of them valid.

    Args:
        values: tensor, the matrix.
        conditioning: the `Conditioning` in force, for `max_rows`.
        is_shared: boolean, whether positions share the kernel.
        num_total: integer, how many rows the layer has, or `None` if unknown while tracing.
    """
    num_valid = ops.shape(values)[-2] if values.shape[-2] is None else values.shape[-2]
    if not is_shared:
        return Rows(values, num_valid, num_valid, num_total)
    values = subsample(values, num_read(conditioning))
    num_sampled = ops.shape(values)[-2] if values.shape[-2] is None else values.shape[-2]
    return Rows(values, num_sampled, num_valid, num_total, True)


def expected_total(sizes: tuple[Any, ...]) -> int | None:
    """Returns how many rows there are, given the sizes of samples and positions."""
    samples, *positions = sizes
    return None if None in positions else math.prod((samples or _DEFAULT_BATCH_SIZE, *positions))


def num_read(conditioning: Conditioning) -> int:
    """Returns the largest number of rows that are read of a layer whose positions share its kernel."""
    return max(plan.NUM_READ, conditioning.max_rows or 0)


def condensed(rows: Rows, shape: tuple[int, ...], conditioning: Conditioning) -> Rows:
    """Returns as many rows as `plan.num_kept` allows for a kernel of this shape: as they are, or sums of them."""
    num_rows = rows.values.shape[-2]
    if num_rows is None and not rows.is_shared:
        return rows
    num_sums = plan.num_kept(rows.num_total, shape[-2], shape[-1], rows.is_shared, conditioning.max_rows)
    if num_sums is None or num_sums >= (num_read(conditioning) if num_rows is None else num_rows):
        return rows
    return rows.of(_signed_sums(rows.values, num_sums, num_read(conditioning)))


def _signed_sums(values: Any, num_sums: int, max_rows: int) -> Any:
    """Returns sums of groups of rows under random signs, `[..., num_sums, in]`: a count sketch.

    Its Gram matrix is that of the rows in expectation (Clarkson and Woodruff, 2013, https://arxiv.org/abs/1207.6365). Rows of
    a group are `num_sums` apart, so that the positions of a sample fall into different groups.
    """
    *groups, num_rows, num_features = ops.shape(values)
    if isinstance(num_rows, int) and num_rows <= _FEW:
        matrix = backend.constant(_matrix_of_sums, num_rows, num_sums)
        return backend.matmul(ops.cast(matrix, values.dtype), values)
    num_terms = -(-(num_rows if isinstance(num_rows, int) else max_rows) // num_sums)
    num_terms = 2 ** (num_terms - 1).bit_length()
    padding = num_terms * num_sums - num_rows
    if not isinstance(padding, int) or padding:
        # `torch.compile` breaks its graph after `ops.pad`.
        values = ops.concatenate([values, ops.zeros((*groups, padding, num_features), values.dtype)], axis=-2)
    # [..., rows, in] -> [..., terms, sums, in]
    values = ops.reshape(values, (*groups, num_terms, num_sums, num_features))
    values = values * ops.cast(backend.constant(_signs, num_terms, num_sums), values.dtype)
    # Adds halves, which is a single pass on XLA. Its reduction over a leading axis takes ten times as long on a CPU.
    while num_terms > 1:
        num_terms //= 2
        values = values[..., :num_terms, :, :] + values[..., num_terms:, :, :]
    return values[..., 0, :, :]


# So few rows are summed by one product: eager PyTorch pays for every operation.
_FEW = 128
# The same in every step and on every backend. `torch.compile` traces no generator of random numbers.
_SIGNS = np.random.default_rng(0).choice(np.array([-1, 1], "float32"), 2 * plan.NUM_READ)


def _signs(num_terms: int, num_sums: int) -> np.ndarray:
    count = num_terms * num_sums
    # More rows than signs: each block of signs has a sign of its own.
    signs = np.outer(_SIGNS[::-1][: -(-count // len(_SIGNS))], _SIGNS)
    return np.reshape(np.ravel(signs)[:count], (num_terms, num_sums, 1))


def _matrix_of_sums(num_rows: int, num_sums: int) -> np.ndarray:
    is_summed = np.arange(num_rows) % num_sums == np.arange(num_sums)[:, None]
    return np.where(is_summed, _SIGNS[:num_rows], np.float32(0))


def subsample(rows: Any, max_rows: int, axis: int = -2) -> Any:
    """Returns at most `max_rows` of the rows along an axis, evenly spread over them."""
    num_rows = ops.shape(rows)[axis]
    if isinstance(num_rows, int) and num_rows <= max_rows:
        return rows
    if isinstance(num_rows, int):
        return ops.take(rows, backend.constant(subsample_indices, num_rows, max_rows), axis=axis)
    return ops.take(rows, subsample_indices(num_rows, max_rows), axis=axis)


def subsample_indices(num_rows: Any, max_rows: Any) -> Any:
    """Returns at most `max_rows` indices below `num_rows`, one in each of as many equal strata.

    They are a NumPy array if both numbers are integers. Rows are samples by positions. A constant stride could pick the same
    position of every sample, so the place within the stratum moves by the golden ratio, which spreads it evenly.
    """
    if isinstance(num_rows, int) and isinstance(max_rows, int):
        strata = np.arange(min(num_rows, max_rows))
        return ((strata + strata * _GOLDEN % 1.0) / len(strata) * num_rows).astype("int32")
    num_rows = ops.cast(num_rows, "float64")
    num_strata = ops.minimum(num_rows, ops.cast(max_rows, "float64"))
    strata = ops.arange(0, num_strata, dtype="float64")
    return ops.cast((strata + strata * _GOLDEN % 1.0) / num_strata * num_rows, "int32")
