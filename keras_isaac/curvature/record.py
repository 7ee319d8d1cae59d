"""What an adapter tells of one meeting of a kernel with rows. Training, `summary` and the monitor read the same."""

import dataclasses
from typing import Any

# The `reason` of calls on sparse inputs.
SPARSE = "sparse inputs"


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A kernel `[*groups, in, out]` that meets rows `[*groups, rows, in]` in one call of its layer.

    Args:
        shape: tuple, the shape of the kernel's matrix, `(*groups, in, out)`.
        rows: tensor `[*groups, rows, in]`, those that stand for all. `None` for a table.
        num_counted: tensor that broadcasts to `[*groups, 1, 1]`, how many of the rows count, where others are zero. `None`:
            all.
        num_represented: integer, how many rows they stand for, or `None` where tracing leaves it open.
        has_product: boolean, whether all rows meet the kernel in one product, so that the gradient of that is at hand.
        frequency: tensor `[in]`, for a table of tokens: the share of each token.
        damping: scalar tensor, for a table: what stands beside the frequencies.
        num_output_rows: integer, how many rows condition the outputs' side, or `None`.
        reason: string, why this call leaves the kernel's gradient plain, or `None`. Nothing else is known of such a call.
    """

    shape: tuple
    rows: Any = None
    num_counted: Any = None
    num_represented: int | None = None
    has_product: bool = False
    frequency: Any = None
    damping: Any = None
    num_output_rows: int | None = None
    reason: str | None = None

    @property
    def num_rows(self):
        """How many rows stand for all, or `None` where tracing leaves it open."""
        return self.num_represented if self.rows is None else self.rows.shape[-2]

    @property
    def num_in(self):
        """The features of a row."""
        return self.shape[-2]

    @property
    def num_out(self):
        """The features of a product."""
        return self.shape[-1]
