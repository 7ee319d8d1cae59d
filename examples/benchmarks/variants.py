"""What was tried to better ISAAC, as methods of `evidence.py`: curvature of other rows, or met elsewhere.

ISAAC conditions the gradient by the rows of the same batch, before the momentum. Here the curvature is a moving average (FOOF,
[Benzing, 2022](https://arxiv.org/abs/2201.12250); before Muon, [Newton-Muon, 2026](https://arxiv.org/abs/2604.01472)), that of
an earlier batch, of the other half of the batch, or of the mean row alone; or it comes after the momentum, or with a damping of
each layer's own. All are written with a matrix `[in, in]` of every kernel, so that an inverse costs what ISAAC spares.
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
        variables = self._with_rate(variables, learning_rate * self._schedule(number, total))
        (loss, (others, grams)), gradients = self._gradients(trainable, others, variables, x[places], y[places])
        new_memory = {}
        for place, (gram, rank) in grams.items():
            mean, inverse = memory[place]
            mean = self.average * mean + (1 - self.average) * gram
            corrected = mean / (1 - self.average ** (number + 1))
            is_due, matrix = number % self.inverse_every == 0, _damped(corrected, rank, second)
            inverse = jax.lax.cond(is_due, lambda matrix, _: jnp.linalg.inv(matrix), lambda _, last: last, matrix, inverse)
            new_memory[place] = mean, inverse
            gradients[place] = _product(inverse, gradients[place])
        trainable, variables = self.optimizer.stateless_apply(variables, gradients, trainable)
        return (trainable, others, (variables, new_memory)), loss

    def _with_rate(self, variables, rate):
        """Returns the values of the optimizer's variables, the learning rate being this one."""
        known = zip(self.optimizer.variables, variables, strict=True)
        return [rate if variable is self.optimizer.learning_rate else value for variable, value in known]

    def _gradients(self, trainable, others, variables, x, y):
        """Returns the loss, with the other variables and the kernels' XᵀX/r and ranks, and the plain gradients."""
        positions = {id(variable): place for place, variable in enumerate(self.model.trainable_variables)}
        mapping = list(zip(self.optimizer.variables, variables, strict=True))

        def loss_of(trainable):
            grams = {}

            def record(kernel, call):
                if call.rows is not None:
                    grams[positions[id(kernel)]] = self._gram(jax.lax.stop_gradient(call.rows))

            # With such a damping the gradients stay plain.
            conditioning = dataclasses.replace(
                self.optimizer.conditioning_of_step(mapping), damping=jnp.float32(1e8), record=record
            )
            with open_scope(conditioning):
                call, updated = self._call(trainable, others)
                loss = self.task.loss(call, x, y)
            return loss, (updated[-1], grams)

        return jax.value_and_grad(loss_of, has_aux=True)(trainable)

    def _gram(self, rows):
        """Returns XᵀX/r and its rank."""
        count = rows.shape[-2]
        return jnp.swapaxes(rows, -2, -1) @ rows / count, min(count, rows.shape[-1])


class ShortMemoryTrainer(MemoryTrainer):
    """One of about four batches."""

    average, inverse_every = 0.5, 1


class AmortizedTrainer(MemoryTrainer):
    """One batch stands for those of ten steps."""

    average, inverse_every = 0.0, 10


class MeanRowTrainer(MemoryTrainer):
    """The mean row stands for all of its batch, so that the inverse is of rank one, and nearly free."""

    average, inverse_every = 0.0, 1

    def _gram(self, rows):
        mean = jnp.mean(rows, axis=-2, keepdims=True)
        return jnp.swapaxes(mean, -2, -1) @ mean, 1


class LateTrainer(MemoryTrainer):
    """The batch's curvature meets the momentum rather than the gradient; the optimizer has none of its own."""

    momentum = 0.9

    def start(self, seed):
        """Returns the state, with a momentum of each weight."""
        trainable, others, initial = Trainer.start(self, seed)
        return trainable, others, (initial, [jnp.zeros_like(weight) for weight in trainable])

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        trainable, others, (variables, momenta) = state
        variables = self._with_rate(variables, learning_rate * self._schedule(number, total))
        (loss, (others, grams)), gradients = self._gradients(trainable, others, variables, x[places], y[places])
        pairs = zip(momenta, gradients, strict=True)
        momenta = [self.momentum * momentum + (1 - self.momentum) * gradient for momentum, gradient in pairs]
        updates = [momentum / (1 - self.momentum ** (number + 1)) for momentum in momenta]
        for place, (gram, rank) in grams.items():
            updates[place] = _product(jnp.linalg.inv(_damped(gram, rank, second)), updates[place])
        trainable, variables = self.optimizer.stateless_apply(variables, updates, trainable)
        return (trainable, others, (variables, momenta)), loss


class WhitenedTrainer(MemoryTrainer):
    """A trainer that whitens the gradient before Muon and the update behind it: steepest descent where rows are white.

    Of steps `R U` with R = (A/λ + I)^-½, it takes the one of the longest descent whose U has no singular value above 1.
    """

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        trainable, others, (variables, memory) = state
        rate = learning_rate * self._schedule(number, total)
        variables = self._with_rate(variables, rate)
        (loss, (others, grams)), gradients = self._gradients(trainable, others, variables, x[places], y[places])
        inner, new_memory = self.optimizer.inner_optimizer, {}
        for place, (gram, rank) in grams.items():
            mean, root = memory[place]
            if not inner.updates_as_matrix(self.model.trainable_variables[place]):
                continue
            mean = self.average * mean + (1 - self.average) * gram
            is_due, matrix = number % self.inverse_every == 0, _damped(mean, rank, self.method.damping)
            root = jax.lax.cond(is_due, lambda matrix, _: _inverse_root(matrix), lambda _, last: last, matrix, root)
            new_memory[place] = mean, root
            gradients[place] = _product(root, gradients[place])
        inner.weight_decay = second
        updated, variables = self.optimizer.stateless_apply(variables, gradients, trainable)
        for place, (_, root) in new_memory.items():
            # The weight decay is no part of the update.
            decayed = trainable[place] * (1 - rate * second)
            updated[place] = decayed + _product(root, updated[place] - decayed)
        return (updated, others, (variables, memory | new_memory)), loss


class CrossFittingTrainer(MemoryTrainer):
    """A trainer whose halves of a batch are conditioned by each other's rows, independent of their gradients."""

    def start(self, seed):
        """Returns the state, as without a memory."""
        return Trainer.start(self, seed)

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        trainable, others, variables = state
        variables = self._with_rate(variables, learning_rate * self._schedule(number, total))
        losses, others, grams, gradients = self._halves(trainable, others, variables, places, x, y)
        for half_gradients, other_grams in zip(gradients, reversed(grams), strict=True):
            for place, (gram, rank) in other_grams.items():
                half_gradients[place] = _product(jnp.linalg.inv(_damped(gram, rank, second)), half_gradients[place])
        means = [sum(pair) / 2 for pair in zip(*gradients, strict=True)]
        trainable, variables = self.optimizer.stateless_apply(variables, means, trainable)
        return (trainable, others, variables), sum(losses) / 2

    def _halves(self, trainable, others, variables, places, x, y):
        """Returns of each half the loss, the kernels' XᵀX/r and ranks and the plain gradients; and the other variables."""
        losses, grams, gradients = [], [], []
        for half in jnp.array_split(places, 2):
            (loss, (others, half_grams)), half_gradients = self._gradients(trainable, others, variables, x[half], y[half])
            losses.append(loss)
            grams.append(half_grams)
            gradients.append(half_gradients)
        return losses, others, grams, gradients


class SignalTrainer(CrossFittingTrainer):
    """A trainer that damps a layer the more, the less the gradients of two halves of the batch agree.

    Where they share half of their square, the damping is the tuned one; it is up to `bound` times more or less.
    """

    average, bound = 0.95, 10.0

    def start(self, seed):
        """Returns the state, with moving averages of each weight's shared square and whole square."""
        trainable, others, initial = super().start(seed)
        return trainable, others, (initial, [jnp.zeros(2) for _ in trainable])

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        trainable, others, (variables, squares) = state
        variables = self._with_rate(variables, learning_rate * self._schedule(number, total))
        losses, others, grams, gradients = self._halves(trainable, others, variables, places, x, y)
        updates, squares = [sum(pair) / 2 for pair in zip(*gradients, strict=True)], list(squares)
        for place, (gram, rank) in grams[0].items():
            one, two = (half[place] for half in gradients)
            now = jnp.stack([jnp.vdot(one, two), (jnp.vdot(one, one) + jnp.vdot(two, two)) / 2])
            squares[place] = self.average * squares[place] + (1 - self.average) * now
            shared, whole = squares[place]
            noise = jnp.clip((whole - shared) / jnp.maximum(shared, 1e-30), 1 / self.bound, self.bound)
            both, rank = (gram + grams[1][place][0]) / 2, min(2 * rank, gram.shape[-1])
            updates[place] = _product(jnp.linalg.inv(_damped(both, rank, second * noise)), updates[place])
        trainable, variables = self.optimizer.stateless_apply(variables, updates, trainable)
        return (trainable, others, (variables, squares)), sum(losses) / 2


def _damped(gram, rank, damping):
    """Returns I + XᵀX/λr, the damping being in units of the mean eigenvalue."""
    unit = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / rank
    return gram / (damping * unit + 1e-30) + jnp.eye(gram.shape[-1])


def _inverse_root(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors * values[..., None, :] ** -0.5 @ jnp.swapaxes(vectors, -2, -1)


def _product(inverse, gradient):
    return (inverse @ gradient.reshape((*inverse.shape[:-1], -1))).reshape(gradient.shape)
