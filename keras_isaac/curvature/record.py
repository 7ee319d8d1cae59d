"""One use of a kernel in a layer call. Training, `summary` and the monitor read the same record."""

import dataclasses
from typing import Any

from keras_isaac.curvature.rows import Rows

# The `reason` of calls on sparse inputs.
SPARSE = "sparse inputs"


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
