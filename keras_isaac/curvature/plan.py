"""Which form conditions a kernel's call, and what it costs. Everyone who wants to know asks here."""

import math

SAMPLE, WOODBURY, FEATURE, DIAGONAL = "sample", "Woodbury", "feature", "diagonal"


def choose(call):
    """Returns the form for a `KernelCall`: the one of the smallest inverse.

    - `"sample"`: an inverse `[rows, rows]` between the rows and the gradient of their product;
    - `"Woodbury"`: an inverse `[rows, rows]` of a few rows that stand for many, applied to the finished gradient;
    - `"feature"`: an inverse `[in, in]`, applied to the finished gradient;
    - `"diagonal"`: a number for each token of a table.

    `None` where the number of rows is open while tracing: the graph then chooses between the sample side and the others.
    """
    if call.frequency is not None:
        return DIAGONAL
    if call.num_rows is None:
        return None
    return _form(call.num_rows, call.num_in, call.has_product and call.num_rows == call.num_represented)


def _form(num_rows, num_in, is_product):
    if is_product and num_rows <= num_in:
        return SAMPLE
    return WOODBURY if num_rows < num_in else FEATURE


def added_multiplications(call):
    """Returns the multiplications that conditioning adds to a step: Gram matrix, inverse, products with rows and gradients."""
    form, num_in, num_out, groups = choose(call), call.num_in, call.num_out, math.prod(call.shape[:-2])
    if form == DIAGONAL:
        # A division for each token of the vocabulary, a product for each that is met.
        return groups * (num_in + call.num_represented * num_out)
    added = _cost(form, call.num_rows, num_in, num_out)
    if call.num_output_rows is not None:
        added += _cost(_form(call.num_output_rows, num_out, False), call.num_output_rows, num_out, num_in)
    return groups * added


def _cost(form, rows, num_in, num_out):
    if form == SAMPLE:
        return rows**2 * num_in + rows**3 + rows**2 * min(num_in, num_out)
    if form == WOODBURY:
        return 2 * rows**2 * num_in + rows**3 + 2 * rows * num_in * num_out
    return rows * num_in**2 + num_in**3 + num_in**2 * num_out
