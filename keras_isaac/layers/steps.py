"""What layers over the steps of a sequence share: other attributes for a while, and the patches of the images of all steps."""

import contextlib
import dataclasses

from keras import ops

from keras_isaac.curvature.rows import Rows, patches, sampled_rows


@contextlib.contextmanager
def attributes(layer, **others):
    """Gives this instance other attributes inside of the `with` block, without what Keras does when one is set."""
    own = vars(layer)
    before = {name: own[name] for name in others if name in own}
    own.update(others)
    try:
        yield
    finally:
        for name in others:
            del own[name]
        own.update(before)


def channels_last(layer, images):
    """Returns `[samples, steps, *spatial, channels]`."""
    return images if layer.data_format == "channels_last" else ops.moveaxis(images, 2, -1)


def patch_rows(images, conditioning, mask, kernel_size, strides, dilation_rate, padding):
    """Returns the patches that a convolution multiplies in the images of all steps, as `Rows` of a matrix.

    Args:
        images: tensor `[samples, steps, *spatial, channels]`.
        conditioning: the `Conditioning` in force.
        mask: tensor `[samples, steps]`, true where a step counts, or `None`.
        kernel_size: tuple of integers, as in `patches`, as are the arguments behind it.
        strides: tuple of integers.
        dilation_rate: tuple of integers.
        padding: string.
    """
    places = (kernel_size, strides, dilation_rate, padding)
    samples, steps, *image = ops.shape(images)
    images = ops.reshape(images, (samples * steps, *image))
    is_reduced = conditioning.weight_sharing == "reduce"
    rows = patches(images, *places, dataclasses.replace(conditioning, max_rows=None) if is_reduced else conditioning)
    # [rows, kernel positions, channels] -> [rows, kernel positions * channels]
    num_in = rows.values.shape[1] * image[-1]
    values = ops.reshape(rows.values, (ops.shape(rows.values)[0], num_in))
    if is_reduced:
        # The mean patch of every image, and then that of a sample's images.
        means = sampled_rows(ops.reshape(values, (samples, steps, num_in)), conditioning, mask)
        return means._replace(num_represented=rows.num_represented)
    if mask is None:
        return Rows(values, None, rows.num_represented)
    # The patches of images of one channel that is the mask. Each has a position in the image, and others may be padding.
    mask = ops.reshape(ops.cast(mask, "float32"), (samples * steps, *[1] * len(image)))
    mask = patches(ops.broadcast_to(mask, (samples * steps, *image[:-1], 1)), *places, conditioning).values
    mask = ops.max(mask, axis=1)
    num_counted = ops.sum(mask, axis=(-2, -1), keepdims=True)
    return Rows(values * ops.cast(mask, values.dtype), num_counted, rows.num_represented)
