"""Curvature with a memory, as a method of `evidence.py`: a moving average of XᵀX, where ISAAC takes that of the batch alone.

It is FOOF ([Benzing, 2022](https://arxiv.org/abs/2201.12250)) around AdamW. The average is a matrix `[in, in]` of every kernel,
so that its inverse costs what ISAAC spares; it is renewed every few steps.
Tables of embeddings stay plain.
"""

import dataclasses

import jax
import jax.numpy as jnp
from evidence import Trainer

from keras_isaac.scope import open_scope


class MemoryTrainer(Trainer):
    """A trainer of one task whose gradients meet (λI + A)⁻¹, A being the moving average."""

    average, inverse_every = 0.95, 10

    def start(self, seed):
        """Returns the state, with an average and an inverse for each kernel that the first batch brings forth."""
        trainable, others, initial = super().start(seed)
        (x, y), *_ = self.parts
        batch = (each[: self.task.batch_size] for each in (x, y))
        (_, (_, grams)), _ = jax.eval_shape(self._gradients, trainable, others, initial, *batch)
        memory = {place: (jnp.zeros(gram.shape), jnp.zeros(gram.shape)) for place, (gram, _) in grams.items()}
        return trainable, others, (initial, memory)

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        trainable, others, (variables, memory) = state
        set_to = {id(self.optimizer.learning_rate): learning_rate * self._schedule(number, total)}
        variables = [set_to.get(id(each), value) for each, value in zip(self.optimizer.variables, variables, strict=True)]
        (loss, (others, grams)), gradients = self._gradients(trainable, others, variables, x[places], y[places])
        new_memory = {}
        for place, (gram, rank) in grams.items():
            mean, inverse = memory[place]
            mean = self.average * mean + (1 - self.average) * gram
            corrected = mean / (1 - self.average ** (number + 1))
            damping = second * jnp.trace(corrected, axis1=-2, axis2=-1)[..., None, None] / rank + 1e-30
            identity = jnp.eye(gram.shape[-1])
            inverse = jax.lax.cond(
                number % self.inverse_every == 0,
                lambda matrix=corrected / damping + identity: jnp.linalg.inv(matrix),
                lambda inverse=inverse: inverse,
            )
            new_memory[place] = mean, inverse
            matrix = gradients[place].reshape((*gram.shape[:-1], -1))
            gradients[place] = (inverse @ matrix).reshape(gradients[place].shape)
        trainable, variables = self.optimizer.stateless_apply(variables, gradients, trainable)
        return (trainable, others, (variables, new_memory)), loss

    def _gradients(self, trainable, others, variables, x, y):
        """Returns the loss, with the other variables and the kernels' XᵀX/r and ranks, and the plain gradients."""
        positions = {id(variable): place for place, variable in enumerate(self.model.trainable_variables)}
        mapping = list(zip(self.optimizer.variables, variables, strict=True))

        def loss_of(trainable):
            grams = {}

            def record(kernel, call):
                if call.rows is not None:
                    rows = jax.lax.stop_gradient(call.rows)
                    count = rows.shape[-2]
                    grams[positions[id(kernel)]] = jnp.swapaxes(rows, -2, -1) @ rows / count, min(count, rows.shape[-1])

            # With such a damping the gradients stay plain.
            conditioning = dataclasses.replace(
                self.optimizer.conditioning_of_step(mapping), damping=jnp.float32(1e8), record=record
            )
            with open_scope(conditioning):
                call, updated = self._call(trainable, others)
                loss = self.task.loss(call, x, y)
            return loss, (updated[-1], grams)

        return jax.value_and_grad(loss_of, has_aux=True)(trainable)
