"""Whether the two halves of the pair have met: an `ISAAC` whose step no captured layer took part in says so."""

from keras_isaac import backend, scope


class Participation:
    """Whether captured layers take part in the steps of one `ISAAC`."""

    def __init__(self):
        # Whether a layer has conditioned a gradient since the last check, and whether one ever has.
        self._has_now = self._has_ever = False
        # In the steps of a model, a function that says why none has.
        self._why_plain = None

    def expect(self, why_plain):
        """Says that a step begins, in which a layer has to condition a gradient before the check.

        Args:
            why_plain: function that returns why none could, as a sentence, or `None` if it does not know.
        """
        self._has_now, self._why_plain = False, why_plain

    def note(self):
        """Says that a layer conditions a gradient."""
        self._has_now = self._has_ever = True

    def forget(self):
        """Says that nothing is captured any more."""
        self._has_ever = False

    def check(self, variables):
        """Raises if the gradients of this step are not conditioned, as far as Python sees the step."""
        was_called = scope.take_plain_calls() and bool(variables) and backend.sees_step(variables[0])
        was_missed = not self._has_now and (self._why_plain is not None or was_called)
        reasons = self._why_plain() if self._why_plain and not self._has_now else None
        self._has_now, self._why_plain = False, None
        if self._has_ever and not was_missed:
            return
        advice = reasons or (
            "Write `model = capture_inputs(model)` (from `keras_isaac`), before or after `model.compile(...)`; in a loop of "
            "your own, compute the loss inside `with optimizer.conditioning():`. If this model is a copy of a captured one "
            "(`clone_model`, `load_model`, pickle), capture the copy; for `SKLearnClassifier`, give a function that builds and "
            "captures the model. If the model is captured already, see that a captured layer is trainable."
        )
        if backend.IS_STATELESS:
            advice += " On the JAX backend, build the model again first: Keras drops its weights when a `fit` fails."
        paths = [getattr(variable, "path", variable.name) for variable in variables]
        raise ValueError(
            "`ISAAC` conditions the kernels of layers whose inputs are captured, but no captured layer took part in this "
            f"step. {advice} To train without conditioning, compile with the inner optimizer. "
            f"Received gradients for: {', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}"
        )
