"""The conditioning scope: which gradients are conditioned now, and with what damping.

A training step opens the scope and captured layers read it. Each thread has its own, because `tf.distribute.MirroredStrategy`
traces every replica in a separate thread.

Two kinds of code run a layer apart from the step that opened the scope, and `backend.in_scopes` covers both. Recomputation runs
the forward pass again in the backward pass, where the scope may be closed: `backend.scopes_of_recomputation` finds its scopes.
And JAX reuses the trace of a function, but only in the scopes in which the trace was made.
"""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from keras_isaac import backend

if TYPE_CHECKING:
    from keras_isaac.curvature.rows import KernelCall


# Not a context variable, which `torch.compile` cannot trace.
class _Open(threading.local):
    scopes: tuple["Conditioning", ...] = ()


_open = _Open()


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What one optimizer asks of the layers during one step.

    Args:
        damping: scalar tensor, λ_a in the paper.
        output_damping: scalar tensor, λ_g in the paper, times the square of the loss scale unless it is relative; or `None`.
        relative_damping: boolean, whether the dampings are in units of the mean eigenvalue.
        preserve_norm: boolean, whether a conditioned gradient has the norm of the plain one.
        weight_sharing: `"expand"` or `"reduce"`, how positions that share a kernel become rows.
        max_rows: integer, the largest number of rows used for a kernel that positions share, or `None`.
        per_replica: boolean, whether each replica conditions on its own rows.
        trains: function of a kernel variable, whether this optimizer updates it.
        on_use: called without arguments whenever a layer conditions a kernel.
        chooses: function of a layer, whether it is conditioned. Defaults to all.
        record: function that is called with this `Conditioning` and each `KernelCall`. `None` in training.
        kernel: the variable that this is for, where `record` or an error names it, or `None`.
    """

    damping: Any
    output_damping: Any
    relative_damping: bool
    preserve_norm: bool
    weight_sharing: str
    max_rows: int | None
    per_replica: bool
    trains: Callable[[Any], bool]
    on_use: Callable[[], None]
    chooses: Callable[[Any], bool] = lambda layer: True
    record: Callable[..., None] | None = None
    kernel: Any = None

    def refuse_outputs(self) -> None:
        """Raises if the output side is to be conditioned where the backward pass has no gradient of one product."""
        if self.output_damping is not None:
            raise ValueError(
                f"Leave the layer of '{self.kernel.path}' out by `capture_inputs(model, exclude=...)`, or use "
                "`output_damping=None`: an `output_damping` conditions only `Dense` and `EinsumDense` layers whose inputs have "
                'no mask, under `weight_sharing="expand"`.'
            )

    def note(self, call: "KernelCall") -> None:
        """Tells `record` of a `KernelCall`."""
        if self.record is not None:
            self.record(self, call)


@contextlib.contextmanager
def open_scope(*conditionings: Conditioning) -> Iterator[None]:
    """Opens the scope for `conditionings`: the first takes precedence, and all of them over those that are open."""
    before = _open.scopes
    _open.scopes = (*conditionings, *before)
    try:
        with backend.in_scopes(_open.scopes):
            yield
    finally:
        _open.scopes = before


def open_scopes() -> tuple[Conditioning, ...]:
    """Returns the open scopes; in the recomputation of a forward pass, those of the forward pass."""
    return _open.scopes or backend.scopes_of_recomputation() or ()


def bind_scope(function: Callable) -> Callable:
    """Returns `function`, which always runs in the scopes that are open now, even after they are closed."""
    return open_scope(*open_scopes())(function)


def conditioning_of(kernel: Any, scopes: tuple[Conditioning, ...]) -> Conditioning | None:
    """Returns the innermost `Conditioning` of `open_scopes` that trains `kernel`, or `None`."""
    for conditioning in scopes:
        if conditioning.trains(kernel):
            return conditioning
    return None


# The checks of optimizers whose scope was closed in a training loop and that have not been applied since. A backward pass that
# follows may recompute the forward pass.
closed: weakref.WeakSet = weakref.WeakSet()
# Not empty if a captured layer was called outside of any scope. Set and cleared, not counted: `torch.compile` guards its value.
plain_calls: set[str] = set()
