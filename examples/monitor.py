"""Measures what conditioning does while a classifier of digits trains: a table of its kernels, and a picture by step.

python monitor.py --backend jax  # half a minute
python monitor.py --damping 0.01
"""

import argparse
import os
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the one that Keras is set to")
parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
parser.add_argument("--damping", type=float, default=1.0, help="default: %(default)s")
parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "output/monitor.png", help="default: %(default)s")
arguments = parser.parse_args()
if arguments.backend:
    # Keras reads it when it is imported.
    os.environ["KERAS_BACKEND"] = arguments.backend

import keras  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from keras_isaac import ISAAC, capture_inputs, summary  # noqa: E402
from keras_isaac.callbacks import CurvatureMonitor  # noqa: E402

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
training, test = (x[360:], y[360:]), (x[:360], y[:360])

hidden = [keras.layers.Dense(256, activation="relu", name=f"hidden_{number}") for number in (1, 2, 3)]
model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, name="logits")], name="digits")
model = capture_inputs(model)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(ISAAC(damping=arguments.damping), loss, metrics=["accuracy"])
summary(model, batch_size=60)

# It measures on a batch that the model does not train on, of the same size as a training batch.
monitor = CurvatureMonitor((x[:60], y[:60]), every_steps=20)
model.fit(*training, batch_size=60, epochs=arguments.epochs, verbose=0, callbacks=[monitor])
print("After {} epochs: test loss {:.4f}, accuracy {:.4f}".format(arguments.epochs, *model.evaluate(*test, verbose=0)))
for layer in model.layers:
    # All measurements are in `monitor.history`.
    cosine, ratio = (monitor.history[f"{layer.name}/{quantity}"][-1] for quantity in ("cosine", "damped_eigenvalue"))
    print(f"{layer.name}: cosine to the plain gradient {cosine:.2f}, largest eigenvalue / damping {ratio:.3g}")

arguments.picture.parent.mkdir(parents=True, exist_ok=True)
monitor.plot().savefig(arguments.picture, dpi=80)
print(f"Picture: {arguments.picture.resolve()}")
