"""Transfer learning: a network of `keras.applications` learns the digits 5 to 9: first a new head, then its last block too.

    python transfer_learning.py

It starts from ImageNet's weights. Where they cannot be downloaded, it first learns the digits 0 to 4 instead.
"""

import keras
from sklearn.datasets import load_digits

from keras_isaac import ISAAC, capture_inputs, summary

WEIGHTS, EPOCHS = "imagenet", 10


def load_base(weights):
    """Returns MobileNet without its head."""
    return keras.applications.MobileNet((32, 32, 3), alpha=0.25, include_top=False, weights=weights, pooling="avg")


keras.utils.set_random_seed(0)
images, digits = load_digits(return_X_y=True)
images = images.astype("float32").reshape(-1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3) / 8 - 1
first = images[digits < 5], digits[digits < 5]
images, classes = images[digits > 4], digits[digits > 4] - 5
training, held_out = (images[:200], classes[:200]), (images[200:], classes[200:])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

try:
    base = load_base(WEIGHTS)
except Exception as error:  # Keras reports a failed download with a plain Exception.
    print(f"ImageNet's weights cannot be downloaded: {error}")
    WEIGHTS = base = None
if WEIGHTS is None:
    base = load_base(None)
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # With few steps, the moving statistics must follow faster.
            layer.momentum = 0.9
    pretrained = keras.Sequential([base, keras.layers.Dense(5)])
    pretrained.compile(keras.optimizers.AdamW(3e-3), loss)
    pretrained.fit(*first, batch_size=32, epochs=EPOCHS, verbose=0)

inputs = keras.Input((32, 32, 3))
# `training=False` keeps the statistics of the batch normalization fixed, also while the layers around it train.
model = capture_inputs(keras.Model(inputs, keras.layers.Dense(5, name="head")(base(inputs, training=False))))
for part, learning_rate in (("the head", 1e-2), ("the last block too", 1e-3)):
    for layer in base.layers:
        layer.trainable = part != "the head" and layer.name.startswith(("conv_dw_13", "conv_pw_13"))
    model.compile(ISAAC(learning_rate), loss, metrics=["accuracy"])
    model.fit(*training, batch_size=20, epochs=EPOCHS, verbose=0)
    print(f"{part}: held-out accuracy {model.evaluate(*held_out, verbose=0)[1]:.3f} after {EPOCHS} epochs more")
summary(model, batch_size=20)
