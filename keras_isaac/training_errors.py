"""What is wrong with a training step of `ISAAC`, and what to write instead."""

from collections.abc import Sequence

import keras

from keras_isaac import backend
from keras_isaac.curvature.rows import SPARSE
from keras_isaac.keras_hooks import isaacs_in
from keras_isaac.selection import is_chosen, shorten, walk
from keras_isaac.status import kernel_status

WEIGHTS_ARE_LOST = (
    " Build the model again before the next `fit`: on JAX, Keras drops its weights when one fails."
    if backend.IS_STATELESS
    else ""
)


def check_is_captured(model: keras.Model, has_own_step: bool) -> None:
    """Raises if a model that is not captured would train with `ISAAC`."""
    # A `train_step` of the model's own may open a scope for layers that were captured otherwise.
    if isaacs_in(model.optimizer) and not (has_own_step and any(is_chosen(layer) for layer, _ in walk(model))):
        raise ValueError(
            f"Write `model = capture_inputs(model)` (from `keras_isaac`) before training: '{model.name}' is compiled with "
            "`ISAAC`, but it is not captured. To train without conditioning, compile with the inner optimizer. A layer "
            "captured alone is conditioned in loops of your own only."
        )


def reused_error(what: str, variables: Sequence) -> ValueError:
    """Returns the error of an `ISAAC` that was built for the variables of another model."""
    return ValueError(
        "Compile each model with an optimizer of its own: `model.compile(optimizer=ISAAC(...), ...)`. This `ISAAC` was built "
        f"for other variables than those of {what}: {paths_of(variables)}."
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


def paths_of(variables: Sequence) -> str:
    """Returns the paths of variables, shortened."""
    return shorten([getattr(variable, "path", variable.name) for variable in variables], 2)
