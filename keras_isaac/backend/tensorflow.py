"""TensorFlow: custom gradients of any order, and an inverse that does not raise."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_isaac.backend.precision import parts_of, product_of_parts

if TYPE_CHECKING:
    from keras_isaac.curvature.operations import ProductFunctions

IS_STATELESS = False
_TINY = 1e-37  # Stands in for a damping and a matrix that are both zero in float32.

segment_sum = tf.math.unsorted_segment_sum
compiled = functools.partial(tf.function, autograph=False)
transpose = tf.linalg.matrix_transpose


def constant(function: Callable, *arguments: Any) -> tf.Tensor:
    """Returns a tensor of the NumPy array `function(*arguments)`."""
    return tf.convert_to_tensor(function(*arguments))


def is_tracing(tensor: Any) -> bool:
    """Returns whether Python runs for the step that computes with `tensor`."""
    return not tf.executing_eagerly()


@contextlib.contextmanager
def in_scopes(scopes: tuple) -> Iterator[None]:
    """Opens the context in which `scopes_of_recomputation` finds these scopes."""

    def get_variable(getter: Callable, *args: Any, **kwargs: Any) -> Any:
        return getter(*args, **kwargs)

    # `tf.recompute_grad` recomputes in the variable scope of the forward pass, which keeps its `custom_getter`.
    get_variable.scopes = scopes  # type: ignore[attr-defined]
    variable_scope = tf.compat.v1.get_variable_scope()
    with tf.compat.v1.variable_scope(variable_scope, custom_getter=get_variable, auxiliary_name_scope=False):
        yield


def scopes_of_recomputation() -> tuple:
    """Returns the scopes of the forward pass that is recomputed here, or an empty tuple."""
    getter = tf.compat.v1.get_variable_scope().custom_getter
    return getattr(getattr(getter, "func", getter), "scopes", ())


def untraced(function: Callable) -> Callable | None:
    """Returns a `tf.function` without the traces that it keeps, or `None` for any other function."""
    if not isinstance(function, tf.types.experimental.PolymorphicFunction):
        return None
    # Eager execution needs no AutoGraph.
    return function.python_function if tf.executing_eagerly() else tf.function(function.python_function)


def traced_once(function: Callable) -> Callable:
    """Returns `function`, traced once for all calls of the same shapes, because tracing takes long."""
    traced = tf.function(function, autograph=False)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if tf.executing_eagerly() else traced)(*args, **kwargs)

    return call


def clip(tensor: tf.Tensor, minimum: float, maximum: float | None = None) -> tf.Tensor:
    """Returns `tensor` with its values clipped to a minimum and, if given, a maximum."""
    tensor = tf.maximum(tensor, minimum)
    return tensor if maximum is None else tf.minimum(tensor, maximum)


def matmul(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Returns `a @ b` in full precision: the default is TF32 on a GPU and bfloat16 on a TPU."""
    if a.dtype != tf.float32 or not _rounds_products():
        return tf.matmul(a, b)
    return product_of_parts(parts_of(a, _truncate), parts_of(b, _truncate), tf.matmul, tf.concat)


def _rounds_products() -> bool:
    return _has("TPU") or (_has("GPU") and tf.config.experimental.tensor_float_32_execution_enabled())


@functools.cache
def _has(kind: str) -> bool:
    return bool(tf.config.list_logical_devices(kind))


def _truncate(tensor: tf.Tensor, mask: int) -> tf.Tensor:
    return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(tensor, tf.int32), mask), tf.float32)


def damped_gram(
    rows: tf.Tensor, damping: Any, count: int | tf.Tensor, is_relative: bool, is_root: bool = False
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns λI + M for M = XXᵀ of rows X `[..., r, n]`, tr(M), and λ."""
    rows = tf.stop_gradient(rows)
    matrix, size, dtype = matmul(rows, transpose(rows)), tf.shape(rows)[-2], rows.dtype
    # `keras.ops.trace` reads the whole matrix.
    total = tf.linalg.trace(matrix)[..., None, None]
    damping, count = tf.convert_to_tensor(damping, dtype), tf.cast(count, dtype)
    damping = tf.clip_by_value(damping * total / count, _TINY, 1 / _TINY) if is_relative else damping * count
    floor = 4 if is_root else 1 / tf.cast(size, dtype)
    epsilon = dtype.as_numpy_dtype(2.0 ** (-52 if dtype == tf.float64 else -23))
    in_force = tf.maximum(damping, epsilon * floor * total + _TINY)
    return matrix + in_force * tf.eye(size, dtype=dtype), total, damping


def damped_projection(
    damped: tf.Tensor, total: tf.Tensor, damping: tf.Tensor, factor: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns λ (λI + M)⁻¹ F for a factor `[..., r, m]`, and whether the bound replaces the inverse."""
    identity = tf.eye(tf.shape(damped)[-1], dtype=damped.dtype)
    root = tf.linalg.triangular_solve(tf.linalg.cholesky(damped), tf.broadcast_to(identity, tf.shape(damped)))
    inverse = matmul(transpose(root), root)
    # Where the factorization failed, no entry is finite.
    failed = ~tf.math.is_finite(inverse[..., -1:, -1:])
    return matmul(damping * tf.where(failed, identity / (damping + total), inverse), factor), failed


def damped_inverse_root(
    damped: tf.Tensor, total: tf.Tensor, damping: tf.Tensor, rows: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns RX with RᵀR = (λI + M)⁻¹ for rows `[..., r, n]`, and whether the bound replaces R."""
    root, bound = tf.linalg.cholesky(damped), damping + total
    failed = ~tf.math.is_finite(root[..., -1:, -1:])
    root = tf.where(failed, tf.sqrt(bound) * tf.eye(tf.shape(damped)[-1], dtype=damped.dtype), root)
    return tf.where(tf.math.is_finite(bound), tf.linalg.triangular_solve(root, rows), 0.0), failed


def _is_mapped() -> bool:
    """Returns whether this is traced by `tf.vectorized_map`, which ignores custom gradients."""
    return not tf.executing_eagerly() and "loop_body" in tf.get_current_name_scope().split("/")


def gate(kernel: Any, residuals: Sequence[Any], condition: Callable, is_linear: bool = True) -> tf.Tensor:
    """Returns `kernel`, whose gradient passes `condition`."""
    if _is_mapped() and is_linear:
        # The map is symmetric, so the gradient of `conditioned` is the conditioned gradient.
        conditioned = condition(tf.convert_to_tensor(kernel), *residuals)
        return tf.stop_gradient(kernel - conditioned) + conditioned

    residuals = tuple(map(_in_this_graph, residuals))

    def gradients(output_gradient: tf.Tensor, kernel: tf.Tensor) -> tuple[Any, ...]:
        return (condition(output_gradient, *residuals),)

    return with_gradients(tf.identity, gradients, kernel)


def product(rows: tf.Tensor, kernel: tf.Tensor, residuals: Sequence[Any], functions: "ProductFunctions") -> tf.Tensor:
    """Returns `rows @ kernel`, whose kernel's gradient is conditioned."""
    if _is_mapped():
        return tf.matmul(rows, functions.gate(kernel, rows, *residuals))

    def gradients(output_gradient: tf.Tensor, rows: tf.Tensor, kernel: tf.Tensor) -> tuple[Any, ...]:
        # The gradient that reaches the kernel through the input gradient is conditioned too.
        gated = functions.gate(kernel, rows, *residuals)
        rows_gradient = tf.matmul(output_gradient, gated, transpose_b=True)
        return rows_gradient, functions.condition(rows, output_gradient, *residuals)

    def multiply(rows: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        # `tf.autodiff.ForwardAccumulator` differentiates this function and does not use `gradients`.
        return tf.matmul(rows, functions.gate(kernel, rows, *residuals))

    return with_gradients(multiply, gradients, rows, kernel)


def with_gradients(function: Callable, gradients: Callable, *tensors: Any) -> Any:
    """Returns `function(*tensors)`, with `gradients(output_gradients, *tensors)` for its gradients."""
    if _is_mapped():
        raise ValueError(
            "`tf.vectorized_map` keeps no custom gradient, so that a layer inside of it cannot be conditioned with "
            "`preserve_norm=True` or an `output_damping`, nor a recurrent one. Write `ISAAC(preserve_norm=False, "
            "output_damping=None)`, or leave that layer out: `capture_inputs(model, exclude=layer)`."
        )

    @tf.custom_gradient
    def call(*tensors: tf.Tensor) -> Any:
        def all_gradients(*output_gradients: Any) -> tuple[Any, ...]:
            # The gradient of an embedding table is `tf.IndexedSlices`.
            output_gradients = tuple(map(tf.convert_to_tensor, output_gradients))
            return gradients(output_gradients if len(output_gradients) > 1 else output_gradients[0], *tensors)

        return function(*tensors), all_gradients

    return call(*map(_in_this_graph, tensors))


def _in_this_graph(tensor: Any) -> tf.Tensor:
    """Returns `tensor` as a tensor of the graph that is being built.

    TensorFlow cannot differentiate a branch of `tf.cond` in which a custom gradient uses a tensor from outside the branch that
    the branch uses too. In eager mode, it does not take a variable for an argument of a custom gradient.
    """
    return tf.convert_to_tensor(tensor) if tf.executing_eagerly() else tf.identity(tensor)


def gradients_of(function: Callable, tensors: Sequence[tf.Tensor]) -> tuple[Any, list[tf.Tensor]]:
    """Returns the second result of `function`, and the gradients of its first, a loss."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        loss, results = function(tensors)
    gradients = tape.gradient(loss, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    # The gradient of an embedding table is `tf.IndexedSlices`.
    return results, [tf.convert_to_tensor(gradient) for gradient in gradients]


def barrier(gradients: Sequence[Any]) -> list[Any]:
    """Returns the gradients of a step, each of which is available only once all of them are.

    An optimizer must not update a variable before all gradients that read it are computed. TensorFlow ensures this by control
    edges from the reads to the update. Keras passes all gradients through one `IdentityN`. Grappler treats the path from a read
    through this operation to the update as a reason to remove the control edge, and later splits the operation, which removes
    the path too. It does not split the call of a function that must not be inlined.
    """
    if tf.executing_eagerly():
        return list(gradients)
    # A new function for each call, because TensorFlow warns if it traces one function often.
    wait = tf.function(lambda tensors: tensors, autograph=False, experimental_attributes={"_noinline": True})
    present = iter(wait([gradient for gradient in gradients if gradient is not None]))
    return [None if gradient is None else next(present) for gradient in gradients]
