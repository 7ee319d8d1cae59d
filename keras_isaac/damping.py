"""The damping of an `ISAAC`: a variable that can be set, or a schedule of the iteration."""

import keras
from keras import ops

from keras_isaac.arguments import LearningRateSchedule, check_damping


class Damping:
    """A damping, as an optimizer keeps it.

    Args:
        damping: float > 0, or a `LearningRateSchedule`.
        owner: string, the name of the optimizer, under which the variable's path lies.
    """

    def __init__(self, damping, owner):
        check_damping(damping)
        self._schedule, self.variables = None, []
        if isinstance(damping, LearningRateSchedule):
            self._schedule = damping
            return
        with keras.name_scope(owner):
            variable = keras.Variable(
                initializer=keras.initializers.Constant(float(damping)),
                shape=(),
                dtype=keras.backend.floatx(),
                trainable=False,
                # Layers read it, and would round it to their compute dtype: 1e-8 is 0 in float16.
                autocast=False,
                aggregation="only_first_replica",
                name="damping",
            )
        self.variables = [variable]

    def at(self, iteration):
        """Returns the variable, or the schedule's value."""
        return self._schedule(iteration) if self._schedule else self.variables[0]

    def assign(self, damping):
        """Sets the variable."""
        check_damping(damping)
        if self._schedule or isinstance(damping, LearningRateSchedule):
            raise TypeError(
                "`damping` can be set only from a number to a number: a `LearningRateSchedule` is part of the compiled "
                "training step. To change it, compile the model with a new `ISAAC(damping=...)`. "
                f"Received: damping={damping}"
            )
        self.variables[0].assign(damping)

    def save(self, store):
        """Saves the variable."""
        if self.variables:
            store["damping"] = self.variables[0].numpy()

    def load(self, store):
        """Loads the variable, if it was saved."""
        if self.variables and "damping" in store.keys():  # noqa: SIM118 (a store of HDF5)
            self.variables[0].assign(store["damping"])

    def get_config(self):
        """Returns the present value, or the serialized schedule."""
        if self._schedule:
            return keras.optimizers.schedules.serialize(self._schedule)
        return float(ops.convert_to_numpy(self.variables[0]))
