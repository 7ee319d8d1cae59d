"""PyTorch: derivatives under every transform, an inverse that neither raises nor waits for a device."""

import functools

import torch

from keras_isaac.backend.precision import parts_of, product_of_parts

_TINY = 1e-37  # Stands in for a damping and a matrix that are both zero in float32.
# Of so many rows, an inverse costs far more than a look whether it is the last one, and is not too large to keep.
_SHARED = range(128, 1025)
_last = torch.empty(0, 0), None


@functools.lru_cache(maxsize=256)
def _on_device(data, shape, dtype, device):
    import numpy as np

    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy()).to(device)


def constant(array):
    """Returns a tensor of a NumPy array on Keras' device, where it is copied once."""
    import keras

    device = keras.ops.zeros(()).device
    return _on_device(array.tobytes(), array.shape, array.dtype.str, device)


# Keras would copy each number to the device, and wait for it.
clip = torch.clamp


# Keras' own functions take longer than these.


def stop_gradient(tensor):
    """Returns `tensor`, through which no gradient flows."""
    return tensor.detach()


def transpose(matrix):
    """Returns a matrix `[..., m, n]` transposed."""
    return matrix.mT


def segment_sum(values, segments, num_segments):
    """Returns the sums of the values of each segment, `[num_segments]`; that of Keras reads the segments on the host."""
    return torch.zeros(num_segments, dtype=values.dtype, device=values.device).index_add(0, segments, values)


def matmul(a, b):
    """Returns `a @ b` in full precision, whatever `torch.set_float32_matmul_precision` says."""
    if a.dtype != torch.float32 or not _rounds_products():
        return a @ b
    return product_of_parts(parts_of(a, _truncate), parts_of(b, _truncate), torch.matmul, torch.cat)


def _rounds_products():
    return torch.get_float32_matmul_precision() != "highest"


def _truncate(tensor, mask):
    return (tensor.view(torch.int32) & mask).view(torch.float32)


def trace(matrix):
    """Returns the sum of the diagonal of `[..., k, k]`, as `[..., 1, 1]`."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def trace_of_gram(rows, gram):
    """Returns tr(XXᵀ) of rows `[..., r, n]`, given XXᵀ or XᵀX, as a number or as `[..., 1, 1]`."""
    return gram.trace().item() if is_in_numbers(gram) else trace(gram)


def is_in_numbers(matrix):
    """Whether traces and dampings are read as numbers: eager PyTorch pays for operations on tensors, and a CPU has no queue."""
    if matrix.device.type != "cpu" or matrix.ndim != 2 or matrix.shape[-1] == 0 or torch.compiler.is_compiling():
        return False
    try:
        matrix.data_ptr()
    except RuntimeError:
        # Under a transform of `torch.func` there is no number to read.
        return False
    return not matrix.requires_grad


def relative_damping(damping, total, rank):
    """Returns δ tr(M)/rank, above zero."""
    if isinstance(total, float):
        return min(max(float(damping) * total / float(rank), _TINY), 1 / _TINY)
    return (damping * total / rank).clamp(_TINY, 1 / _TINY)


def damped_projection(matrix, total, damping, rows):
    """Returns λ (λI + M)⁻¹ X for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    return matmul(damping * damped_inverse(matrix, total, damping), rows)


def damped_inverse(matrix, total, damping):
    """Returns (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total`."""
    if matrix.shape[-1] == 0:
        return matrix
    inverse = _inverse_in_numbers(matrix, total, damping) if isinstance(total, float) else None
    if inverse is not None:
        return inverse
    return _from_factor(matrix, total, damping, 1 / matrix.shape[-1], torch.cholesky_inverse, 1)


def damped_inverse_root(matrix, total, damping, rows):
    """Returns RF with RᵀR = (λI + M)⁻¹ for a matrix `[..., k, k]` of the trace `total` and rows `[..., k, n]`."""
    if matrix.shape[-1] == 0:
        return rows

    def solve(factor):
        # From the factor at once, which spares a product.
        return torch.linalg.solve_triangular(factor, rows, upper=False)

    factor = None
    if isinstance(total, float):
        factor = _factor_if_definite(_damped_in_numbers(matrix, total, damping, 4))
    whitened = _from_factor(matrix, total, damping, 4, solve, 0.5) if factor is None else solve(factor)
    return whitened.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _damped_in_numbers(matrix, total, damping, floor):
    damped = matrix.clone()
    damped.diagonal().add_(max(float(damping), torch.finfo(matrix.dtype).eps * floor * total + _TINY))
    return damped


def _factor_if_definite(matrix):
    factor, failed_at = torch.linalg.cholesky_ex(matrix)
    return factor if failed_at.item() == 0 else None


def _inverse_in_numbers(matrix, total, damping):
    """Returns the inverse, or `None`. Layers that share their input, as query, key and value do, share its inverse."""
    global _last
    damped = _damped_in_numbers(matrix, total, damping, 1 / matrix.shape[-1])
    last_matrix, last_inverse = _last
    if damped.shape == last_matrix.shape and damped.dtype == last_matrix.dtype and torch.equal(damped, last_matrix):
        return last_inverse
    factor = _factor_if_definite(damped)
    inverse = None if factor is None else torch.cholesky_inverse(factor)
    if damped.shape[-1] in _SHARED:
        _last = damped, inverse
    return inverse


def _from_factor(matrix, total, damping, floor, inverse_of, power):
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    bound = damping + total
    in_force = _at_least(total * (floor * torch.finfo(matrix.dtype).eps) + _TINY, damping)
    # The `_ex` form neither raises nor waits for the device.
    factor, failed_at = torch.linalg.cholesky_ex(matrix + in_force * identity)
    failed = (failed_at > 0)[..., None, None]
    inverse = inverse_of(torch.where(failed, identity, factor))
    return torch.where(failed, inverse / bound**power, inverse)


def _at_least(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a.clamp(min=b) if isinstance(a, torch.Tensor) else b.clamp(min=a)
    return max(a, b)


# `torch.autograd.Function` binds the signature of `forward` in every call, if it is to work under the transforms of
# `torch.func`. That takes as long as the rest of it, so that the ordinary call goes another way.


def _with_fast_path(function):
    class FastPath(function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = function.forward(*inputs)
            function.setup_context(ctx, inputs, outputs)
            return outputs

        setup_context = torch.autograd.Function.setup_context

    def apply(*inputs):
        try:
            return FastPath.apply(*inputs)
        except RuntimeError:
            # `torch.func` wants the context set up apart. What else went wrong does so again.
            return function.apply(*inputs)

    return apply


def _save(ctx, *tensors):
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _sum_of(*tangents):
    tangents = [tangent for tangent in tangents if tangent is not None]
    return functools.reduce(torch.add, tangents) if tangents else None


def _mapped(tensor, axis, size):
    """Returns a tensor with the axis that `torch.func.vmap` maps in front."""
    if tensor is None or (axis is None and tensor.ndim == 0):
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor[:, None, None] if tensor.ndim == 1 else tensor


@_with_fast_path
class _gate(torch.autograd.Function):  # noqa: N801 (a function to whoever calls it)
    @staticmethod
    def forward(condition, kernel, twin, *residuals):
        return kernel.view_as(kernel)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.condition, _, _, *residuals = inputs
        _save(ctx, *residuals)

    @staticmethod
    def backward(ctx, output_gradient):
        # Read once: recomputation does not give them a second time.
        residuals = ctx.saved_tensors
        conditioned = ctx.condition(output_gradient, *residuals) if ctx.needs_input_grad[1] else None
        twin_gradient = output_gradient if ctx.needs_input_grad[2] else None
        return None, conditioned, twin_gradient, *(None for _ in residuals)

    @staticmethod
    def jvp(ctx, _, kernel_tangent, twin_tangent, *__):
        if kernel_tangent is not None:
            kernel_tangent = ctx.condition(kernel_tangent, *ctx.saved_tensors)
        return _sum_of(kernel_tangent, twin_tangent)

    @staticmethod
    def vmap(info, axes, condition, *tensors):
        # The kernel is mapped where only the rows are: each has a gradient of its own to condition.
        tensors = (_mapped(tensor, axis, info.batch_size) for tensor, axis in zip(tensors, axes[1:], strict=True))
        return _gate(condition, *tensors), 0


def gate(kernel, twin, residuals, condition):
    """Returns `kernel`, whose tangent and gradient pass a symmetric linear map."""
    return _gate(condition, kernel, twin, *residuals)


@_with_fast_path
class _product(torch.autograd.Function):  # noqa: N801
    generate_vmap_rule = True

    @staticmethod
    def forward(functions, rows, kernel, twin, *residuals):
        return rows @ kernel

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.functions, *tensors = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx, output_gradient):
        rows, kernel, twin, *residuals = ctx.saved_tensors
        rows_gradient = kernel_gradient = twin_gradient = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():
                # What reaches the kernel through the derivative of the inputs is conditioned too.
                kernel = ctx.functions.gate(kernel, twin, rows, *residuals)
            rows_gradient = output_gradient @ kernel.mT
        if ctx.needs_input_grad[2]:
            kernel_gradient = ctx.functions.condition(rows, output_gradient, *residuals)
        if ctx.needs_input_grad[3]:
            twin_gradient = rows.mT @ output_gradient
        return None, rows_gradient, kernel_gradient, twin_gradient, *(None for _ in residuals)

    @staticmethod
    def jvp(ctx, _, rows_tangent, kernel_tangent, twin_tangent, *__):
        rows, kernel, twin, *residuals = ctx.saved_tensors
        parts = []
        if rows_tangent is not None:
            parts.append(rows_tangent @ ctx.functions.gate(kernel, twin, rows, *residuals))
        if kernel_tangent is not None:
            parts.append(ctx.functions.tangent(rows, kernel_tangent, *residuals).to(rows.dtype))
        if twin_tangent is not None:
            parts.append(rows @ twin_tangent)
        return _sum_of(*parts)


def product(rows, kernel, twin, residuals, functions):
    """Returns `rows @ kernel`, whose kernel's tangent and gradient are conditioned."""
    return _product(functions, rows, kernel, twin, *residuals)


@_with_fast_path
class _with_gradients(torch.autograd.Function):  # noqa: N801
    # `keras.ops.custom_gradient` would compute the input gradient of the first layer, which nobody asks for, and turn an
    # exception of the forward pass into a gradient of NaN.
    generate_vmap_rule = True

    @staticmethod
    def forward(function, gradients, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, ctx.gradients, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *output_gradients):
        output_gradients = output_gradients if len(output_gradients) > 1 else output_gradients[0]
        return None, None, *ctx.gradients(output_gradients, *ctx.saved_tensors)


def with_gradients(function, gradients, *tensors):
    """Returns `function(*tensors)`, with `gradients(output_gradients, *tensors)` for its gradients."""
    return _with_gradients(function, gradients, *tensors)


def gradients_of(function, tensors):
    """Returns what `function` returns beside a loss, and the gradients of that loss."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    # Dropout without a seed draws from PyTorch's own.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        loss, beside = function(tensors)
        return beside, torch.autograd.grad(loss, tensors, materialize_grads=True)


def compiled(measure, variables):
    """Returns `measure(data, values)` as a function of the data, with the present values of the variables."""
    return lambda data: measure(data, [variable.value for variable in variables]).detach()
