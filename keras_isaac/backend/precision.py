"""Products in full precision where a backend has no switch for one product: TensorFlow, and PyTorch under a global setting."""

from collections.abc import Callable, Sequence
from typing import Any

_PART = -65536  # 0xFFFF0000: the sign, the exponent and seven bits of a float32, which is what bfloat16 holds.


def parts_of(tensor: Any, truncate: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
    """Splits a float32 tensor into three that bfloat16 and TF32 hold exactly; their sum is the tensor.

    Args:
        tensor: float32 tensor.
        truncate: function of a tensor and a mask, which sets the bits outside of the mask to zero.
    """
    first = truncate(tensor, _PART)
    second = truncate(tensor - first, _PART)
    return first, second, tensor - first - second


def product_of_parts(
    a: Sequence[Any], b: Sequence[Any], matmul: Callable[[Any, Any], Any], concatenate: Callable[[list[Any], int], Any]
) -> Any:
    """Returns the product of two float32 matrices given as `parts_of`, by one product of rounded operands and full sums.

    Of the nine products of parts, the three smallest are below the last digit of float32.
    """
    left = concatenate([a[0], a[0], a[1], a[0], a[2], a[1]], -1)
    right = concatenate([b[0], b[1], b[0], b[2], b[0], b[1]], -2)
    return matmul(left, right)
