"""An optimizer around another, as Keras, its callbacks and its savers want one to look."""

import keras


class OptimizerAround(keras.optimizers.Optimizer):
    """Optimizer that leaves to an inner one what is not the gradients.

    Args:
        inner_optimizer: the Keras optimizer.
        name: string, or `None`: chosen by Keras.
    """

    def __init__(self, inner_optimizer, name=None):
        # The base class keeps a learning rate of its own; as in LossScaleOptimizer, the inner optimizer's is the one in use.
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    def apply_gradients(self, grads_and_vars):
        """Applies pairs of gradient and variable; returns the iterations."""
        grads, trainable_variables = zip(*grads_and_vars, strict=True)
        self.apply(list(grads), trainable_variables)
        return self.iterations

    @property
    def learning_rate(self):
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """The inner optimizer's iterations."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        """The inner optimizer's static loss scale, which LossScaleOptimizer and MultiOptimizer set."""
        inner_optimizer = getattr(self, "inner_optimizer", None)
        return None if inner_optimizer is None else inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, loss_scale_factor):
        # The base class sets it before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = loss_scale_factor

    # Callbacks look one level into an optimizer, at these names: in a LossScaleOptimizer they find `ISAAC`.

    @property
    def use_ema(self):
        """Whether the inner optimizer averages the weights."""
        # The base class asks as it builds, and would keep an average of its own.
        return self.built and self.inner_optimizer.use_ema

    @use_ema.setter
    def use_ema(self, use_ema):
        # The base class sets it before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.use_ema = use_ema

    @property
    def _model_variables_moving_average(self):
        return self.inner_optimizer._model_variables_moving_average

    def scale_loss(self, loss):
        """Scales the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        """Finishes training as the inner optimizer does (its moving average)."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights):
        """Sets all variables, in the order of `variables`."""
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)
