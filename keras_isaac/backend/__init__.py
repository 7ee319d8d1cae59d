"""What differs between backends: one module for each, with the functions below.

Products and inverses, of rows X `[..., r, n]` and M = XXᵀ:

- `matmul(a, b)`: a product of float32 or float64 in full precision, whatever the backend's default for products is.
- `transpose(matrix)`: of the last two axes.
- `damped_gram(rows, damping, count, is_relative, is_root=False)`: λI + M, tr(M), and λ = damping · count, or, if relative,
  damping · tr(M) / count. The last two are numbers or tensors that broadcast to `[..., 1, 1]`. No derivative is taken of them.
- `damped_projection(damped, total, damping, factor)`, given those three: λ (λI + M)⁻¹ F, linear in F `[..., r, m]`.
- `damped_inverse_root(damped, total, damping, rows)`, likewise with `is_root=True`: RX with RᵀR = (λI + M)⁻¹, R the inverse of
  the Cholesky factor.

No inverse raises. A damping below what the dtype resolves is raised to it in the matrix: to the mean eigenvalue's epsilon for
the inverse, to four epsilons of the trace for the root. If M is still numerically indefinite, the lower bound 1/(λ + tr M)
replaces the inverse: the step is then the plain gradient, shortened. The second result of both functions says for which
matrices. If M overflows, the first is zero. If M is NaN, so is the projection, and the root is zero.

Tensors:

- `constant(function, *arguments)`: a tensor of the NumPy array `function(*arguments)`, which is computed once.
- `clip(tensor, minimum, maximum)`: the tensor, its values held between two numbers, which are not copied to the device.
- `segment_sum(values, segments, num_segments)`: the sums of the values of each segment.

Derivatives:

- `gate(kernel, residuals, condition, is_linear)`: the kernel; its gradient passes `condition(gradient, *residuals)`. If that is
  a symmetric linear map, so does its tangent.
- `product(rows, kernel, residuals, functions)`: `rows @ kernel`; see `ProductFunctions`.
- `with_gradients(function, gradients, *tensors)`: `function(*tensors)`, with `gradients(output_gradients, *tensors)`, a
  tuple, for its gradients. It need not be linear, and has no forward mode.

State:

- `IS_STATELESS`: whether a step is a function of the values of all variables, which replace the variables while it is traced.
  A tensor cannot be given an attribute then.
- `is_tracing(tensor)`: whether Python runs for the step that computes with a tensor: in every step on PyTorch, elsewhere only
  while it is compiled. An eager call on TensorFlow and JAX may be part of a step whose other parts were compiled before.
- `barrier(gradients)`: the gradients, each available only once all of them are. A variable may be updated then.
- `in_scopes(scopes)`: the context of open scopes, which separates traces of different scopes (JAX) or is found by:
- `scopes_of_recomputation()`: in the recomputation of a forward pass, the scopes in which that pass ran, or `None` if they are
  not known any more; an empty tuple elsewhere.
- `untraced(function)`: a function that keeps traces (`tf.function`), without them; `None` for any other.

Compiling and measuring:

- `traced_once(function)`: the function, traced once for all calls of the same shapes where that saves time.
- `compiled(function)`: a function of nested tensors, compiled where the backend compiles.
- `gradients_of(function, tensors)`: the second result of `function`, and the gradients of its first, a loss.
"""

import importlib

import keras

if keras.backend.backend() not in ("jax", "tensorflow", "torch"):
    raise ImportError(
        "`keras_isaac` trains on JAX, PyTorch and TensorFlow. Set the environment variable KERAS_BACKEND to jax, torch or "
        f"tensorflow before Keras is imported. Received: the backend {keras.backend.backend()}"
    )

_backend = importlib.import_module(f"keras_isaac.backend.{keras.backend.backend()}")

IS_STATELESS = _backend.IS_STATELESS
clip = _backend.clip
compiled = _backend.compiled
constant = _backend.constant
damped_gram = _backend.damped_gram
damped_inverse_root = _backend.damped_inverse_root
damped_projection = _backend.damped_projection
gate = _backend.gate
gradients_of = _backend.gradients_of
in_scopes = _backend.in_scopes
is_tracing = _backend.is_tracing
matmul = _backend.matmul
product = _backend.product
segment_sum = _backend.segment_sum
transpose = _backend.transpose
with_gradients = _backend.with_gradients

# Where there is nothing to do: no variable is read after its update, and nothing is traced, or tracing is cheap.
barrier = getattr(_backend, "barrier", list)
scopes_of_recomputation = getattr(_backend, "scopes_of_recomputation", tuple)
traced_once = getattr(_backend, "traced_once", lambda function: function)
untraced = getattr(_backend, "untraced", lambda function: None)
