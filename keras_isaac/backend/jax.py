"""JAX: custom derivatives in both directions, and an inverse for every device."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from keras_isaac.backend.elimination import gauss_jordan, inverse
from keras_isaac.backend.layout import with_sharding

if TYPE_CHECKING:
    from keras_isaac.curvature.operations import ProductFunctions

IS_STATELESS = True
# Stands in for a damping and a matrix that are both zero in float32.
_TINY = 1e-37

clip = jnp.clip
compiled = jax.jit
transpose = operator.attrgetter("mT")
segment_sum = jax.ops.segment_sum


def constant(function: Callable, *arguments: Any) -> jax.Array:
    """Returns a tensor of the NumPy array `function(*arguments)`."""
    return jnp.asarray(function(*arguments))


def is_tracing(tensor: Any) -> bool:
    """Whether Python runs for the step that computes with `tensor`."""
    return isinstance(getattr(tensor, "value", tensor), jax.core.Tracer)


# Part of the key of every cache of traces. An older JAX has no such context.
_scope_key: Callable[[Any], contextlib.AbstractContextManager] = (
    jax.make_user_context() if hasattr(jax, "make_user_context") else lambda key: contextlib.nullcontext()
)


def in_scopes(scopes: Sequence[Any]) -> contextlib.AbstractContextManager:
    """Returns a context that retraces functions that were traced in other scopes."""
    return _scope_key(tuple(_key(getattr(scope, field.name)) for scope in scopes for field in dataclasses.fields(scope)))


def _key(value: Any) -> Any:
    """Returns what `value` compares by. A tracer equals nothing: a trace that uses it must not be used again."""
    if isinstance(value, jax.core.Tracer):
        return object()
    return value.item() if isinstance(value, jax.Array) else value


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `a @ b` in full precision: the default is bfloat16 on a TPU and TF32 on a GPU."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def damped_gram(
    rows: jax.Array, damping: jax.Array, count: int | jax.Array, is_relative: bool, is_root: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns λI + M for M = XXᵀ of rows X `[..., r, n]`, tr(M), and λ."""
    rows = jax.lax.stop_gradient(rows)
    matrix, size = matmul(rows, transpose(rows)), rows.shape[-2]
    total = _trace_of_gram(rows, matrix)
    damping = jnp.clip(damping * total / count, _TINY, 1 / _TINY) if is_relative else damping * count
    floor = 4 if is_root else 1 / max(size, 1)
    in_force = jnp.maximum(damping, jnp.finfo(rows.dtype).eps * floor * total + _TINY)
    return matrix + in_force * jnp.eye(size, dtype=rows.dtype), total, damping


@jax.jit
def _trace_of_gram(rows: jax.Array, gram: jax.Array) -> jax.Array:
    # On a GPU or a TPU the sum of the squares is fused with what reads the rows anyway; a slice is not.
    return jax.lax.platform_dependent(
        rows, gram, cpu=_trace, default=lambda rows, gram: jnp.sum(rows * rows, axis=(-2, -1), keepdims=True)
    )


def _trace(_: jax.Array, matrix: jax.Array) -> jax.Array:
    # A strided slice: XLA would read the whole matrix for a sum under a mask.
    size = matrix.shape[-1]
    diagonal = jnp.reshape(matrix, (*matrix.shape[:-2], size * size))[..., :: size + 1]
    return jnp.sum(diagonal, axis=-1)[..., None, None]


def damped_projection(
    damped: jax.Array, total: jax.Array, damping: jax.Array, factor: jax.Array
) -> tuple[jax.Array, bool | jax.Array]:
    """Returns λ (λI + M)⁻¹ F for a factor `[..., r, m]`, and whether the bound replaces the inverse."""
    if not damped.shape[-1]:
        return factor, False
    # Every device computes the whole inverse. Split over devices, an elimination would communicate for every pivot.
    inverted = with_sharding(_inverse(with_sharding(damped), damping + total + _TINY))
    is_finite = jnp.isfinite(inverted)
    bound = damping / (damping + total) * jnp.eye(damped.shape[-1], dtype=damped.dtype)
    return matmul(jnp.where(is_finite, damping * inverted, bound), factor), ~jnp.all(is_finite, axis=(-2, -1))


def damped_inverse_root(
    damped: jax.Array, total: jax.Array, damping: jax.Array, rows: jax.Array
) -> tuple[jax.Array, bool | jax.Array]:
    """Returns RX with RᵀR = (λI + M)⁻¹ for rows `[..., r, n]`, and whether the bound replaces R."""
    if not damped.shape[-1]:
        return rows, False
    whitened = _whitened(with_sharding(damped), rows)
    is_finite = jnp.isfinite(whitened)
    bounded = jnp.where(is_finite, whitened, rows / jnp.sqrt(damping + total))
    return jnp.nan_to_num(bounded, nan=0.0, posinf=0.0, neginf=0.0), ~jnp.all(is_finite, axis=(-2, -1))


# Layers with matrices of the same shape share a trace. If a pivot is not positive, no entry is finite.
@jax.jit
def _inverse(damped: jax.Array, bound: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(damped, bound, cpu=inverse, default=_inverse_by_cholesky)


@jax.jit
def _whitened(damped: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(damped, rows, cpu=_whiten_by_elimination, default=_whiten_by_cholesky)


def _inverse_by_cholesky(matrix: jax.Array, _: jax.Array) -> jax.Array:
    root = _whiten_by_cholesky(matrix, jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape))
    return matmul(jnp.swapaxes(root, -2, -1), root)


def _whiten_by_cholesky(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.lax.linalg.triangular_solve(factor, rows, left_side=True, lower=True)


def _whiten_by_elimination(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    return matmul(gauss_jordan(matrix, is_root=True), rows)


def gate(kernel: jax.Array, residuals: Sequence[Any], condition: Callable, is_linear: bool = True) -> jax.Array:
    """Returns `kernel`, whose gradient passes `condition`, and so does its tangent if that is a symmetric linear map."""
    kernel = _vary_as(kernel, residuals)
    if not is_linear:

        def gradients(output_gradient: jax.Array, kernel: jax.Array, *residuals: Any) -> tuple[Any, ...]:
            return condition(output_gradient, *residuals), *(None for _ in residuals)

        def identity_of_call(kernel: jax.Array, values: jax.Array, *_: Any) -> jax.Array:
            # Under `vmap` each mapped call has a kernel of its own, and so a gradient of its own.
            return jnp.where(jnp.isnan(values[..., :1, :1]).any(), kernel, kernel)

        return with_gradients(identity_of_call, gradients, kernel, *jax.lax.stop_gradient(tuple(residuals)))

    @jax.custom_jvp
    def identity(kernel: jax.Array, residuals: tuple[Any, ...]) -> jax.Array:
        return kernel

    @functools.partial(identity.defjvp, symbolic_zeros=True)
    def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        # The primal goes through the gate again: an outer derivative is taken of this function.
        tangent = tangents[0]
        conditioned = jnp.zeros_like(primals[0]) if _is_zero(tangent) else condition(tangent, *primals[1])
        return identity(*primals), conditioned.astype(primals[0].dtype)

    return identity(kernel, jax.lax.stop_gradient(tuple(residuals)))


def _vary_as(kernel: Any, tensors: Iterable[Any]) -> Any:
    """Returns `kernel`, in a `jax.shard_map` as a value of each device's own if one of the tensors is.

    Each device then conditions its gradient on its own rows, and the sum over devices comes after.
    """
    missing = frozenset().union(*map(_varying_axes, tensors)) - _varying_axes(kernel)
    return jax.lax.pcast(kernel, tuple(missing), to="varying") if missing else kernel


def _varying_axes(tensor: Any) -> frozenset:
    """Returns the axes of the mesh along which a value in `jax.shard_map(check_vma=True)` differs."""
    kind = jax.typeof(tensor) if hasattr(jax, "typeof") else None  # An older JAX has no `typeof`, and no such axes.
    # Versions of JAX name it differently.
    return getattr(getattr(kind, "manual_axis_type", None), "varying", None) or getattr(kind, "vma", None) or frozenset()


def product(rows: jax.Array, kernel: jax.Array, residuals: Sequence[Any], functions: "ProductFunctions") -> jax.Array:
    """Returns `rows @ kernel`, whose tangent is that of the plain product with P in front of the kernel's part."""

    @jax.custom_jvp
    def multiply(rows: jax.Array, kernel: jax.Array, residuals: tuple[Any, ...]) -> jax.Array:
        return rows @ kernel

    @functools.partial(multiply.defjvp, symbolic_zeros=True)
    def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        rows, kernel, residuals = primals
        rows_tangent, kernel_tangent, _ = tangents
        outputs, parts = multiply(*primals), []
        if not _is_zero(rows_tangent):
            # The gradient that reaches the kernel through the input gradient is conditioned too.
            parts.append(rows_tangent @ functions.gate(kernel, rows, *residuals))
        if not _is_zero(kernel_tangent):
            parts.append(functions.tangent(rows, kernel_tangent, *residuals))
        parts = [part.astype(outputs.dtype) for part in parts]
        return outputs, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(outputs)

    return multiply(rows, kernel, jax.lax.stop_gradient(tuple(residuals)))


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, SymbolicZero)


def with_gradients(function: Callable, gradients: Callable, *tensors: Any) -> Any:
    """Returns `function(*tensors)`, with `gradients(output_gradients, *tensors)` for its gradients."""

    @jax.custom_vjp
    def call(*tensors: Any) -> Any:
        return function(*tensors)

    tensors = tuple(_vary_as(tensor, tensors) for tensor in tensors)

    def forward(*tensors: Any) -> tuple[Any, tuple[Any, ...]]:
        return call(*tensors), tensors

    def backward(tensors: tuple[Any, ...], output_gradients: Any) -> tuple[Any, ...]:
        return tuple(gradients(output_gradients, *tensors))

    call.defvjp(forward, backward)
    return call(*tensors)


def gradients_of(function: Callable, tensors: Sequence[jax.Array]) -> tuple[Any, Sequence[jax.Array]]:
    """Returns the second result of `function`, and the gradients of its first, a loss."""
    gradients, results = jax.grad(function, has_aux=True)(tensors)
    return results, gradients
