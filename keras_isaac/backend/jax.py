"""JAX: custom derivatives in both directions, and an inverse for every device."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from keras_isaac.backend.elimination import gauss_jordan
from keras_isaac.backend.layout import with_sharding

if TYPE_CHECKING:
    import keras

    from keras_isaac.curvature.operations import ProductFunctions

IS_STATELESS = True
TENSORS_TAKE_ATTRIBUTES = False
# Stands in for a damping and a matrix that are both zero in float32.
_TINY = 1e-37

constant = jnp.asarray
clip = jnp.clip
stop_gradient = jax.lax.stop_gradient


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


def scopes_of_recomputation() -> tuple[()]:
    """Returns nothing: JAX recomputes what it traced, and runs no Python."""
    return ()


def untraced(function: Callable) -> None:
    """Returns `None`: no function of a layer keeps a trace of another scope."""
    return None


def traced_once(function: Callable) -> Callable:
    """Returns `function`: tracing is cheap on JAX."""
    return function


def transpose(matrix: jax.Array) -> jax.Array:
    """Returns a matrix `[..., m, n]` transposed."""
    return jnp.swapaxes(matrix, -2, -1)


def segment_sum(values: jax.Array, segments: jax.Array, num_segments: int) -> jax.Array:
    """Returns the sums of the values of each segment, `[num_segments]`."""
    return jax.ops.segment_sum(values, segments, num_segments)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `a @ b` in full precision: the default is bfloat16 on a TPU and TF32 on a GPU."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def trace(matrix: jax.Array) -> jax.Array:
    """Returns the sum of the diagonal of `[..., k, k]`, as `[..., 1, 1]`."""
    # A strided slice: XLA would read the whole matrix for a sum under a mask.
    size = matrix.shape[-1]
    diagonal = jnp.reshape(matrix, (*matrix.shape[:-2], size * size))[..., :: size + 1]
    return jnp.sum(diagonal, axis=-1)[..., None, None]


@jax.jit
def trace_of_gram(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """Returns tr(XXᵀ) of rows `[..., r, n]`, given XXᵀ or XᵀX, as `[..., 1, 1]`."""
    # On a GPU or a TPU the sum of the squares is fused with what reads the rows anyway; a slice is not.
    return jax.lax.platform_dependent(
        rows,
        gram,
        cpu=lambda rows, gram: trace(gram),
        default=lambda rows, gram: jnp.sum(rows * rows, axis=(-2, -1), keepdims=True),
    )


def relative_damping(damping: jax.Array, total: jax.Array, rank: int | jax.Array) -> jax.Array:
    """Returns δ tr(M)/rank, above zero."""
    return jnp.clip(damping * total / rank, _TINY, 1 / _TINY)


def damped_projection(matrix: jax.Array, total: jax.Array, damping: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns λ (λI + M)⁻¹ X for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    projected = matmul(damping * _unguarded_inverse(matrix, total, damping), rows)
    # The guard costs least on the product.
    return jnp.where(jnp.isfinite(projected), projected, damping / (damping + total) * rows)


def eager_projection(rows: jax.Array, factor: jax.Array, damping: jax.Array, is_relative: bool) -> None:
    """Returns `None`: `damped_projection` is compiled."""
    return None


def damped_inverse(matrix: jax.Array, total: jax.Array, damping: jax.Array) -> jax.Array:
    """Returns (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total`."""
    inverse = _unguarded_inverse(matrix, total, damping)
    return jnp.where(jnp.isfinite(inverse), inverse, jnp.eye(matrix.shape[-1], dtype=matrix.dtype) / (damping + total))


def damped_inverse_root(matrix: jax.Array, total: jax.Array, damping: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns RF with RᵀR = (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    if not matrix.shape[-1]:
        return rows
    whitened = _whitened(with_sharding(matrix), total, damping, rows)
    whitened = jnp.where(jnp.isfinite(whitened), whitened, rows / jnp.sqrt(damping + total))
    return jnp.nan_to_num(whitened, nan=0.0, posinf=0.0, neginf=0.0)


def is_indefinite(matrix: jax.Array, total: jax.Array, damping: jax.Array, is_root: bool = False) -> jax.Array:
    """Returns for each matrix `[..., k, k]` whether a bound replaces its inverse, as `[...]`."""
    if is_root:
        identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
        inverse = _whitened(with_sharding(matrix), total, damping, identity)
    else:
        inverse = _unguarded_inverse(matrix, total, damping)
    return ~jnp.all(jnp.isfinite(inverse), axis=(-2, -1))


def _unguarded_inverse(matrix: jax.Array, total: jax.Array, damping: jax.Array) -> jax.Array:
    # Every device computes the whole inverse. Split over devices, an elimination would communicate for every pivot.
    return with_sharding(_inverse(with_sharding(matrix), total, damping)) if matrix.shape[-1] else matrix


# Layers with matrices of the same shape share a trace. If a pivot is not positive, no entry is finite.
@jax.jit
def _inverse(matrix: jax.Array, total: jax.Array, damping: jax.Array) -> jax.Array:
    damped = _damped(matrix, total, damping, 1 / matrix.shape[-1])
    return jax.lax.platform_dependent(damped, cpu=gauss_jordan, default=_inverse_by_cholesky)


@jax.jit
def _whitened(matrix: jax.Array, total: jax.Array, damping: jax.Array, rows: jax.Array) -> jax.Array:
    damped = _damped(matrix, total, damping, 4)
    return jax.lax.platform_dependent(damped, rows, cpu=_whiten_by_elimination, default=_whiten_by_cholesky)


def _damped(matrix: jax.Array, total: jax.Array, damping: jax.Array, floor: float) -> jax.Array:
    """Returns λI + M for a λ of at least `floor` times the trace's epsilon."""
    damping = jnp.maximum(damping, jnp.finfo(matrix.dtype).eps * floor * total + _TINY)
    return matrix + damping * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


def _inverse_by_cholesky(matrix: jax.Array) -> jax.Array:
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
    missing = frozenset().union(*(_varying_axes(tensor) for tensor in tensors if tensor is not None)) - _varying_axes(kernel)
    return jax.lax.pcast(kernel, tuple(missing), to="varying") if missing else kernel


def _varying_axes(tensor: Any) -> frozenset:
    """Returns the axes of the mesh along which a value in `jax.shard_map(check_vma=True)` differs."""
    kind = jax.typeof(tensor)
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

    tensors = tuple(None if tensor is None else _vary_as(tensor, tensors) for tensor in tensors)

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


# No variable is read after its update.
barrier = list


def compiled(measure: Callable, variables: "Sequence[keras.Variable]") -> Callable[[Any], Any]:
    """Returns `measure(data, values)` as a function of the data, with the present values of the variables."""
    jitted = jax.jit(measure)
    return lambda data: jitted(data, [variable.value for variable in variables])
