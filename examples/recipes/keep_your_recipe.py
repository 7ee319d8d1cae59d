"""Keep your recipe: a model that you already train with AdamW, and the same with `ISAAC` around that AdamW.

    python keep_your_recipe.py

Two lines change: `capture_inputs(model)`, and `ISAAC(inner_optimizer=...)` around the optimizer. The learning rate schedule,
weight decay, batch size and epochs stay as they are.
"""

import keras
from sklearn.datasets import load_digits

from keras_isaac import ISAAC, capture_inputs

EPOCHS, BATCH_SIZE = 10, 50

images, digits = load_digits(return_X_y=True)
images = images.astype("float32").reshape(-1, 8, 8, 1) / 16
training, held_out = (images[:1400], digits[:1400]), (images[1400:], digits[1400:])


def build_model():
    """A small convolutional network."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def build_optimizer():
    """The optimizer of your recipe."""
    num_steps = EPOCHS * len(training[0]) // BATCH_SIZE
    return keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, num_steps), weight_decay=0.01)


for name in ("AdamW", "ISAAC around AdamW"):
    keras.utils.set_random_seed(0)
    model, optimizer = build_model(), build_optimizer()
    if name != "AdamW":
        model = capture_inputs(model)
        optimizer = ISAAC(inner_optimizer=optimizer)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(*training, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0)
    loss, accuracy = model.evaluate(*held_out, verbose=0)
    print(f"{name}: held-out loss {loss:.3f}, accuracy {accuracy:.3f}")
