"""A training loop of your own, one for each backend: `python custom_loop.py --backend jax`.

The forward pass runs inside `optimizer.conditioning()`; all else is the loop that the backend's users write.
"""

import argparse
import os


def train_tensorflow(model, optimizer, loss_fn, x, y, num_steps):
    """`tf.GradientTape`."""
    import tensorflow as tf

    @tf.function
    def train_step(x, y):
        with optimizer.conditioning(), tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    optimizer.build(model.trainable_variables)
    return [float(train_step(x, y)) for _ in range(num_steps)]


def train_torch(model, optimizer, loss_fn, x, y, num_steps):
    """`loss.backward()`."""
    import torch

    x, y = torch.tensor(x), torch.tensor(y)
    losses = []
    for _ in range(num_steps):
        model.zero_grad()
        with optimizer.conditioning():
            loss = loss_fn(y, model(x, training=True))
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        losses.append(loss.item())
    return losses


def train_jax(model, optimizer, loss_fn, x, y, num_steps):
    """`jax.value_and_grad` over `stateless_call`; the optimizer's variables are part of the state."""
    import jax

    def compute_loss(trainable_variables, non_trainable_variables, optimizer_variables, x, y):
        with optimizer.conditioning(optimizer_variables):
            y_pred, non_trainable_variables = model.stateless_call(
                trainable_variables, non_trainable_variables, x, training=True
            )
        return loss_fn(y, y_pred), non_trainable_variables

    @jax.jit
    def train_step(state, x, y):
        trainable_variables, non_trainable_variables, optimizer_variables = state
        (loss, non_trainable_variables), gradients = jax.value_and_grad(compute_loss, has_aux=True)(
            trainable_variables, non_trainable_variables, optimizer_variables, x, y
        )
        trainable_variables, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable_variables
        )
        return loss, (trainable_variables, non_trainable_variables, optimizer_variables)

    optimizer.build(model.trainable_variables)
    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = tuple([v.value for v in group] for group in variables)
    losses = []
    for _ in range(num_steps):
        loss, state = train_step(state, x, y)
        losses.append(float(loss))
    for group, values in zip(variables, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
    return losses


def main():
    """Trains a small network on scikit-learn's digits and prints the loss every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's, as Keras reads it"
    )
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    import keras
    from sklearn.datasets import load_digits

    from keras_isaac import ISAAC, capture_inputs

    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = x[:128].astype("float32") / 16, y[:128].astype("int32")
    layers = [keras.Input((64,)), keras.layers.Dense(200, activation="relu"), keras.layers.Dense(10)]
    model = capture_inputs(keras.Sequential(layers))
    optimizer = ISAAC(learning_rate=2.0, damping=0.1, inner_optimizer="sgd", relative_damping=False)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train = {"jax": train_jax, "tensorflow": train_tensorflow, "torch": train_torch}[keras.backend.backend()]
    losses = train(model, optimizer, loss_fn, x, y, arguments.steps)
    for step in range(0, len(losses), 10):
        print(f"step {step:3d}  loss {losses[step]:.4f}")
    print(f"step {len(losses) - 1:3d}  loss {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
