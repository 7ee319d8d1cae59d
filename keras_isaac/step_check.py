"""Whether `ISAAC` conditions something in a training step, and the errors that say what to write if it does not."""

import weakref
from collections.abc import Sequence

import keras

from keras_isaac import backend, scope
from keras_isaac.curvature.rows import SPARSE
from keras_isaac.selection import shorten
from keras_isaac.status import kernel_status

_WEIGHTS_ARE_LOST = (
    " Build the model again before the next `fit`: on JAX, Keras drops its weights when one fails."
    if backend.IS_STATELESS
    else ""
)


class StepCheck:
    """Whether a captured layer conditions a gradient in the current step of an `ISAAC`."""

    def __init__(self) -> None:
        # The variables that the optimizer was built for, by id; none before.
        self.trained: dict[int, keras.Variable] = {}
        # Whether a layer did so since the last check, and whether one ever did.
        self._has_now = self._has_ever = False
        self._model: weakref.ref[keras.Model] | None = None

    def begin(self, model: keras.Model) -> None:
        """Notes that a step of a captured model begins: a layer has to condition a gradient before the check."""
        self._has_now, self._model = False, weakref.ref(model)

    def note_use(self) -> None:
        """Notes that a layer conditions a gradient."""
        self._has_now = self._has_ever = True

    def forget(self) -> None:
        """Forgets all uses, because the model is not captured any more."""
        self._has_ever = False

    def check(self, variables: Sequence | None) -> None:
        """Raises if the gradients of this step are not conditioned, as far as Python sees the step.

        Args:
            variables: the variables whose gradients are applied, or `None` for those that the optimizer was built for.
        """
        scope.closed.discard(self)
        if variables is None:
            variables = list(self.trained.values())
        was_called = bool(scope.plain_calls and variables) and backend.is_tracing(variables[0])
        scope.plain_calls.clear()
        model = None if self._model is None else self._model()
        was_missed = not self._has_now and (model is not None or was_called)
        self._has_now, self._model = False, None
        if self._has_ever and not was_missed:
            return
        if self.trained and not any(id(variable) in self.trained for variable in variables):
            raise reused_error("this step", variables)
        received = f"Received gradients for: {_paths(variables)}"
        if model is None:
            raise ValueError(
                "Write `model = capture_inputs(model)` (from `keras_isaac`) before training; in a loop of your own, compute "
                "the loss inside `with optimizer.conditioning():`. No captured layer took part in this step. "
                f"{received}.{_WEIGHTS_ARE_LOST}"
            )
        advice = nothing_to_condition(model) or (
            f"Call a captured layer in the training step of '{model.name}', or compile with the inner optimizer: none that "
            "`ISAAC` could condition took part in it."
        )
        raise ValueError(f"{advice} {received}.{_WEIGHTS_ARE_LOST}")


def reused_error(what: str, variables: Sequence) -> ValueError:
    """Returns the error of an `ISAAC` that was built for the variables of another model."""
    return ValueError(
        "Compile each model with an optimizer of its own: `model.compile(optimizer=ISAAC(...), ...)`. This `ISAAC` was built "
        f"for other variables than those of {what}: {_paths(variables)}."
    )


def nothing_to_condition(model: keras.Model) -> str | None:
    """Returns what to write if no kernel of a captured model can be conditioned, or `None` if one can."""
    statuses = sorted(kernel_status(model), key=lambda status: not status.trainable)
    # A layer on sparse inputs takes part, and warns that it stays plain.
    if any(status.reason in (None, SPARSE) for status in statuses):
        return None
    reasons = [f"'{status.path}' ({status.reason})" for status in statuses]
    return (
        "Include, unfreeze or register (`keras_isaac.register_layer`) a layer that multiplies its inputs by a kernel, or "
        f"compile with the inner optimizer: `ISAAC` can condition nothing in '{model.name}'. "
        f"Kernels: {shorten(reasons) or 'none'}."
    )


def _paths(variables: Sequence) -> str:
    return shorten([getattr(variable, "path", variable.name) for variable in variables], 2)
