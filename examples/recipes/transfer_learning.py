"""Transfer learning: a network of `keras.applications` learns the digits 5 to 9: first a new head, then its last block too.

    python transfer_learning.py --backend jax

It starts from ImageNet's weights. Where they cannot be downloaded, it learns the digits 0 to 4 first.
"""

import argparse
import os


def parse_arguments():
    """Reads the command line, and sets what Keras reads when it is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's")
    parser.add_argument("--weights", choices=["imagenet", "none"], default="imagenet", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of each part (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    return arguments


def load_base(weights):
    """Returns MobileNet without its head, and whether it has learnt anything."""
    import keras

    def build(weights):
        return keras.applications.MobileNet((32, 32, 3), alpha=0.25, include_top=False, weights=weights, pooling="avg")

    if weights == "imagenet":
        try:
            return build("imagenet"), True
        except Exception as error:
            # A failed download of Keras raises no class of its own.
            print(f"ImageNet's weights cannot be downloaded: {error}")
    return build(None), False


def load_data():
    """Returns images `[samples, 32, 32, 3]` in [-1, 1] and classes: of the digits 0 to 4, and of 5 to 9."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    images = images.astype("float32").reshape(-1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3) / 8 - 1
    return (images[digits < 5], digits[digits < 5]), (images[digits > 4], digits[digits > 4] - 5)


def main():
    """Trains the head, then the last block with it, and prints the accuracy of held-out digits."""
    arguments = parse_arguments()
    import keras

    from keras_isaac import ISAAC, capture_inputs, summary

    keras.utils.set_random_seed(0)
    (first_images, first_classes), (images, classes) = load_data()
    training, held_out = (images[:200], classes[:200]), (images[200:], classes[200:])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base, has_learnt = load_base(arguments.weights)
    if not has_learnt:
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                # The steps are few, and the statistics are to follow in time.
                layer.momentum = 0.9
        first = keras.Sequential([base, keras.layers.Dense(5)])
        first.compile(keras.optimizers.AdamW(3e-3), loss)
        first.fit(first_images, first_classes, batch_size=32, epochs=arguments.epochs, verbose=0)

    inputs = keras.Input((32, 32, 3))
    # `training=False` keeps the statistics of the batch normalization, also when the layers around it are trained.
    outputs = keras.layers.Dense(5, name="head")(base(inputs, training=False))
    model = capture_inputs(keras.Model(inputs, outputs))
    for part, learning_rate in (("the head", 1e-2), ("the last block too", 1e-3)):
        for layer in base.layers:
            layer.trainable = part != "the head" and layer.name.startswith(("conv_dw_13", "conv_pw_13"))
        model.compile(ISAAC(learning_rate), loss, metrics=["accuracy"])
        model.fit(*training, batch_size=20, epochs=arguments.epochs, verbose=0)
        accuracy = model.evaluate(*held_out, verbose=0)[1]
        print(f"{part}: held-out accuracy {accuracy:.3f} after {arguments.epochs} epochs more")
    summary(model, batch_size=20)


if __name__ == "__main__":
    main()
