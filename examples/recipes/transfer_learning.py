"""Transfer learning: a network of `keras.applications` tells digits apart, first by a new head, then by its last block too.

    python transfer_learning.py --backend jax

It starts from ImageNet's weights, and from random ones where they cannot be downloaded.
"""

import argparse
import os


def parse_arguments():
    """Reads the command line, and sets what Keras reads when it is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's")
    parser.add_argument("--weights", choices=["imagenet", "none"], default="imagenet", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=1797, help="of all of the digits (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of each part (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    return arguments


def load_base(weights):
    """Returns MobileNetV2 without its head."""
    import keras

    def build(weights):
        return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, include_top=False, weights=weights, pooling="avg")

    if weights == "imagenet":
        try:
            return build("imagenet")
        except Exception as error:
            # Keras' download raises a plain `Exception`.
            print(f"The weights cannot be downloaded, so that they are random: {error}")
    return build(None)


def load_data(num_samples):
    """Returns training and held-out images `[samples, 96, 96, 3]`, in [-1, 1] as MobileNetV2 takes them, and classes."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    images = images[:num_samples].reshape(-1, 8, 8, 1).repeat(12, axis=1).repeat(12, axis=2).repeat(3, axis=3)
    images, split = images.astype("float32") / 8 - 1, num_samples * 4 // 5
    return (images[:split], classes[:split]), (images[split:], classes[split:num_samples])


def main():
    """Trains the head, then the last block with it, and prints the accuracy of held-out digits."""
    arguments = parse_arguments()
    import keras

    from keras_isaac import ISAAC, capture_inputs, summary

    keras.utils.set_random_seed(0)
    training, held_out = load_data(arguments.samples)
    base = load_base(arguments.weights)
    base.trainable = False
    inputs = keras.Input((96, 96, 3))
    # `training=False` keeps the statistics of the batch normalization, also when the layers around it are trained.
    outputs = keras.layers.Dense(10, name="head")(base(inputs, training=False))
    model = capture_inputs(keras.Model(inputs, outputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for part, learning_rate in (("the head", 1e-2), ("the last block too", 1e-3)):
        if part != "the head":
            base.trainable = True
            for layer in base.layers:
                layer.trainable = layer.name.startswith(("block_16", "Conv_1"))
        model.compile(ISAAC(learning_rate), loss, metrics=["accuracy"])
        model.fit(*training, batch_size=32, epochs=arguments.epochs, verbose=0)
        accuracy = model.evaluate(*held_out, verbose=0)[1]
        print(f"{part}: held-out accuracy {accuracy:.3f} after {arguments.epochs} epochs")
    summary(model, batch_size=32)


if __name__ == "__main__":
    main()
