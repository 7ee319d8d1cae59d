"""Shows what conditioning does while a classifier of digits trains: a table of its kernels, and a picture of the monitor.

python monitor.py --backend jax                           # half a minute
python monitor.py --damping 0.1 --picture monitor.png
"""

import argparse
import os
import statistics
import time
from pathlib import Path


def parse_arguments():
    """Reads the command line, and chooses the backend before Keras is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's, as Keras reads it"
    )
    parser.add_argument("--width", type=int, default=256, help="of the three hidden layers (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--damping", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--every-steps", type=int, default=20, help="between measurements (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("monitor.png"), help="where it goes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    return arguments


def main():
    """Trains, prints the table and saves the picture."""
    arguments = parse_arguments()
    import keras
    from sklearn.datasets import load_digits

    import keras_isaac
    from keras_isaac.callbacks import CurvatureMonitor

    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    # The batch that is held aside is of the size of the batches that train.
    held, trained = (x[:60], y[:60]), (x[60:], y[60:])
    hidden = [keras.layers.Dense(arguments.width, "relu", name=f"hidden_{number}") for number in (1, 2, 3)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, name="logits")], name="digits")
    model = keras_isaac.capture_inputs(model)
    optimizer = keras_isaac.ISAAC(0.003, arguments.damping)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    keras_isaac.summary(model, batch_size=60)
    seconds = []

    class TimedMonitor(CurvatureMonitor):
        def on_train_batch_begin(self, batch, logs=None):
            if keras.backend.backend() == "jax":
                # Steps that are still under way are not the measurement's.
                self.model.jax_state_sync()
            keras.ops.convert_to_numpy(self.model.trainable_variables[-1])
            start, measured = time.perf_counter(), len(self.history["step"])
            super().on_train_batch_begin(batch, logs)
            if len(self.history["step"]) > measured:
                seconds.append(time.perf_counter() - start)

    monitor = TimedMonitor(held, every_steps=arguments.every_steps)
    # The first step and the first measurement compile; they are not timed.
    model.fit(*held, verbose=0)
    start = time.perf_counter()
    logs = model.fit(*trained, batch_size=60, epochs=arguments.epochs, verbose=0, callbacks=[monitor]).history
    step = (time.perf_counter() - start - sum(seconds)) / (arguments.epochs * -(-len(trained[0]) // 60))
    measurement = statistics.median(seconds[1:])
    print(f"After {arguments.epochs} epochs: loss {logs['loss'][-1]:.4g}, accuracy {logs['accuracy'][-1]:.4f} in training.")
    print(
        f"A step took {1000 * step:.2f} ms, a measurement {1000 * measurement:.2f} ms (median): {measurement / step:.2f} % of "
        "training if it is made every 100 steps."
    )
    monitor.plot().savefig(arguments.picture, dpi=80)
    print(f"saved {arguments.picture}")


if __name__ == "__main__":
    main()
