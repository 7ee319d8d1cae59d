"""Two optimizers that work on whole kernels, as baselines and as inner optimizers of ISAAC: Muon and SOAP.

Both treat a kernel as a matrix of inputs by outputs, also in attention and convolutions. AdamW updates all other variables.
"""

import math
import re

import keras
from keras import ops


class MatrixOptimizer(keras.optimizers.AdamW):
    """AdamW for all variables except kernels, which a subclass updates as matrices.

    A subclass defines `build_matrix`, which returns the state of a matrix, and `matrix_update`, which returns the update; the
    step subtracts the learning rate times the update.

    Args:
        learning_rate: float or schedule.
        exclude: regular expression; AdamW updates variables whose path it matches. Defaults to `None`: none.
        **kwargs: arguments of `AdamW`.
    """

    def __init__(self, learning_rate=0.001, *, exclude=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.exclude = exclude

    def build(self, variables):
        """Builds the state of AdamW, and that of the matrices."""
        if self.built:
            return
        super().build(variables)
        self._states = {}
        for variable in variables:
            if len(variable.shape) > 1 and not (self.exclude and re.search(self.exclude, variable.path)):
                self._states[id(variable)] = self.build_matrix(*matrix_shape(variable.shape))

    def updates_as_matrix(self, variable):
        """Whether it does not leave this variable to AdamW."""
        return id(variable) in self._states

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable."""
        if not self.updates_as_matrix(variable):
            super().update_step(gradient, variable, learning_rate)
            return
        matrix = ops.reshape(gradient, matrix_shape(variable.shape))
        update = self.matrix_update(matrix, self._states[id(variable)])
        self.assign_sub(variable, learning_rate * ops.reshape(update, variable.shape))

    def zeros(self, *shape):
        """Adds a variable of zeros to the state."""
        return self.add_variable(shape, initializer="zeros")


def matrix_shape(shape):
    """Splits the axes of a kernel into inputs and outputs so that the matrix is as square as possible."""
    splits = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    return min(splits, key=lambda split: abs(math.log(split[0] / split[1])))


class Muon(MatrixOptimizer):
    """Orthogonalizes the momentum of each kernel ([Liu et al., 2025](https://arxiv.org/abs/2502.16982)).

    `keras.optimizers.Muon` does this only for kernels of two axes; for these, the steps are the same.
    """

    momentum, num_iterations, scale = 0.95, 5, 0.2
    coefficients = (3.4445, -4.7750, 2.0315)

    def build_matrix(self, num_rows, num_columns):
        """The momentum."""
        return self.zeros(num_rows, num_columns)

    def matrix_update(self, gradient, momentum):
        """Nesterov's momentum, with singular values near 1."""
        self.assign(momentum, self.momentum * momentum + gradient)
        x = gradient + self.momentum * momentum
        is_tall = x.shape[0] > x.shape[1]
        x = ops.transpose(x) if is_tall else x
        x = x / (ops.norm(x) + 1e-7)
        a, b, c = self.coefficients
        for _ in range(self.num_iterations):
            gram = x @ ops.transpose(x)
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = ops.transpose(x) if is_tall else x
        return self.scale * math.sqrt(max(x.shape)) * x


class SOAP(MatrixOptimizer):
    """Adam in the eigenbasis of Shampoo's two factors ([Vyas et al., 2024](https://arxiv.org/abs/2409.11321)).

    Args:
        learning_rate: float or schedule.
        basis_every: integer, number of steps between updates of the eigenbasis, each one step of the power method.
        **kwargs: arguments of `MatrixOptimizer`.
    """

    def __init__(self, learning_rate=0.003, *, basis_every=10, weight_decay=0.01, **kwargs):
        super().__init__(learning_rate, weight_decay=weight_decay, beta_1=0.95, beta_2=0.95, **kwargs)
        self.basis_every = basis_every

    def build_matrix(self, num_rows, num_columns):
        """The momentum, the second moment in the basis, and for each side the factor and its basis."""
        moments = self.zeros(num_rows, num_columns), self.zeros(num_rows, num_columns)
        return *moments, *((self.zeros(size, size), self.zeros(size, size)) for size in (num_rows, num_columns))

    def matrix_update(self, gradient, state):
        """Adam's update in the basis, rotated back. The first step only fills the factors, since there is no basis yet."""
        momentum, second_moment, *sides = state
        step = ops.cast(self.iterations, gradient.dtype)
        (left, right), (left_factor, right_factor) = ([basis for _, basis in sides], [factor for factor, _ in sides])
        self.assign(momentum, self.beta_1 * momentum + (1 - self.beta_1) * gradient)
        turned = ops.transpose(left) @ gradient @ right
        self.assign(second_moment, self.beta_2 * second_moment + (1 - self.beta_2) * turned * turned)
        # The moments are zero in the first step, as the bases are.
        root = ops.sqrt(second_moment / (1 - self.beta_2 ** ops.maximum(step, 1))) + 1e-8
        turned_momentum = ops.transpose(left) @ momentum @ right / (1 - self.beta_1 ** (step + 1))
        update = left @ (turned_momentum / root) @ ops.transpose(right)
        self.assign(left_factor, self.beta_2 * left_factor + (1 - self.beta_2) * gradient @ ops.transpose(gradient))
        self.assign(right_factor, self.beta_2 * right_factor + (1 - self.beta_2) * ops.transpose(gradient) @ gradient)
        moments = ops.convert_to_tensor(second_moment)
        for axis, (factor, basis) in enumerate(sides):
            new_basis, moments = self._renewed(*map(ops.convert_to_tensor, (factor, basis, moments)), axis)
            self.assign(basis, new_basis)
        self.assign(second_moment, moments)
        return update

    def _renewed(self, factor, basis, moments, axis):
        """Returns the basis of this step, and the second moments in its order."""

        def first():
            return ops.flip(ops.linalg.eigh(factor)[1], axis=1), moments

        def next_one():
            # Columns in the order of their eigenvalues, so that orthogonalization starts from the largest.
            order = ops.flip(ops.argsort(ops.sum(basis * (factor @ basis), axis=0)))
            return ops.linalg.qr(factor @ ops.take(basis, order, axis=1))[0], ops.take(moments, order, axis=axis)

        def same():
            return basis, moments

        is_due = self.iterations % self.basis_every == 0
        return ops.cond(self.iterations == 0, first, lambda: ops.cond(is_due, next_one, same))
