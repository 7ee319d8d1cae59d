"""Which form conditions a kernel, on how many rows, and what it costs. Nothing else decides this."""

import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_isaac.curvature.rows import KernelCall

SAMPLE, WOODBURY, FEATURE, DIAGONAL = "sample", "Woodbury", "feature", "diagonal"

# The multiplications that conditioning may add, as a share of the layer's own, and the number of rows that are always
# affordable: where positions share the kernel, and for one row a sample.
BUDGET, MIN_ROWS = 0.1, 64
PLAIN_BUDGET, PLAIN_MIN_ROWS = 1.0, 8
# The number of rows that are read, to be summed. Reading costs little compared with a product with a kernel.
NUM_READ = 1024


def choose(call: "KernelCall") -> str | None:
    """Returns the form for a `KernelCall`: the one with the smallest inverse.

    - `"sample"`: an inverse `[rows, rows]` between the rows and the gradient of their product;
    - `"Woodbury"`: an inverse `[rows, rows]`, applied to the finished gradient;
    - `"feature"`: an inverse `[in, in]`, applied to the finished gradient;
    - `"diagonal"`: a number for each token of a table.

    `None` if the number of rows is unknown while tracing: the form is then chosen in the graph.
    """
    if call.rows is None:
        return DIAGONAL
    num_rows, num_in = call.rows.values.shape[-2:]
    if num_rows is None:
        return None
    return SAMPLE if call.has_product and num_rows <= num_in else _form(num_rows, num_in)


def num_kept(num_total: int | None, num_in: int, num_out: int, is_shared: bool, max_rows: int | None) -> int | None:
    """Returns the number of rows, or sums of rows, on which a kernel is conditioned; `None` for all.

    As many as add at most `BUDGET` times the layer's own multiplications, but at least `MIN_ROWS`.

    Args:
        num_total: integer, the rows of the layer, or `None` if unknown while tracing.
        num_in: integer, the features of a row.
        num_out: integer, the features of a product.
        is_shared: boolean, whether positions share the kernel.
        max_rows: integer that the user chose instead, or `None`.
    """
    if max_rows is not None:
        return max_rows if is_shared else None
    if num_total is None:
        return MIN_ROWS if is_shared else None
    budget, least = (BUDGET, MIN_ROWS) if is_shared else (PLAIN_BUDGET, PLAIN_MIN_ROWS)
    allowed = budget * 3 * num_total * num_in * num_out
    if not is_shared and affords_all(num_total, num_in, num_out):
        return None
    kept = NUM_READ
    while kept > least and _cost(_form(kept, num_in), kept, num_in, num_out) > allowed:
        kept //= 2
    return kept


# Eager PyTorch asks in every step.
@functools.cache
def affords_all(num_total: int, num_in: int, num_out: int) -> bool:
    """Returns whether a kernel that is used once a sample is conditioned on all samples: not a narrow one in a large batch."""
    form = SAMPLE if num_total <= num_in else FEATURE
    return _cost(form, num_total, num_in, num_out) <= PLAIN_BUDGET * 3 * num_total * num_in * num_out


def _form(num_rows: int, num_in: int) -> str:
    """Returns the form for a finished gradient."""
    return WOODBURY if num_rows < num_in else FEATURE


def added_multiplications(call: "KernelCall") -> int:
    """Returns the multiplications that conditioning adds to a step: Gram matrix, inverse, products with rows and gradients."""
    form, num_in, num_out, groups = choose(call), call.num_in, call.num_out, math.prod(call.shape[:-2])
    num_rows = call.num_rows
    if form is None or num_rows is None:
        raise ValueError(f"The number of rows must be known to count multiplications. Received: call={call}")
    if form == DIAGONAL:
        # A division for each token of the vocabulary, a product for each token that is looked up.
        return groups * (num_in + num_rows * num_out)
    added = _cost(form, num_rows, num_in, num_out)
    if call.num_output_rows is not None:
        added += _cost(_form(call.num_output_rows, num_out), call.num_output_rows, num_out, num_in)
    return groups * added


def _cost(form: str, num_rows: int, num_in: int, num_out: int) -> int:
    if form == SAMPLE:
        return num_rows**2 * num_in + num_rows**3 + num_rows**2 * min(num_in, num_out)
    if form == WOODBURY:
        return 2 * num_rows**2 * num_in + num_rows**3 + 2 * num_rows * num_in * num_out
    return num_rows * num_in**2 + num_in**3 + num_in**2 * num_out
