"""Custom layers, registered by `register_layer`."""

import keras
import numpy as np
import oracle
import pytest
from cases import assert_conditioned
from harness import each_mode, normal, paper_isaac, plain_and_conditioned, run
from models import assert_only_damping_matters, captured, fit, keras_hub
from oracle import relative_error
from readings import one_group

from keras_isaac import ISAAC, capture_inputs, kernel_status, register_adapter, register_layer
from keras_isaac.selection import walk


class Toy(keras.layers.Layer):
    """Squares its inputs, multiplies by a kernel `[in, 2, 3]`, counts its calls and adds a loss."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(input_shape[-1], 2, 3), initializer="normal")
        self.calls = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, inputs):
        self.calls.assign_add(1.0)
        outputs = keras.ops.tensordot(keras.ops.square(inputs), self.weight, axes=1)
        self.add_loss(0.01 * keras.ops.sum(keras.ops.square(outputs)))
        return outputs

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2, 3)


register_layer(Toy, kernel="weight", rows=lambda layer, inputs: keras.ops.square(inputs))


@each_mode
def test_a_registered_layer_is_conditioned_on_its_rows(compiled):
    layer = Toy()
    layer.build((5, 8))
    inputs, cotangent = normal((5, 8), (5, 2, 3))
    reading = {id(layer.weight): (inputs[None].astype("float64") ** 2, one_group)}
    assert_conditioned(layer, reading, *plain_and_conditioned(layer, inputs, cotangent, compiled), 0.3)


class Scaled(keras.layers.Layer):
    """Has another name for its first argument."""

    def build(self, hidden_states_shape):
        self.weight = self.add_weight(shape=(hidden_states_shape[-1], 5), initializer="normal")

    def call(self, hidden_states, scale=1.0):
        return keras.ops.matmul(hidden_states, self.weight) * scale


class OfTwo(keras.layers.Layer):
    """Has a list of inputs."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(input_shape[-1][-1], 5), initializer="normal")

    def call(self, inputs):
        return keras.ops.matmul(inputs[1], self.weight) + keras.ops.mean(inputs[0])


@pytest.mark.parametrize("kind", [Scaled, OfTwo])
def test_inputs_by_keyword_under_another_name_and_in_a_list(kind):
    register_layer(kind, kernel="weight", rows=lambda layer, inputs: inputs[1] if kind is OfTwo else inputs)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = kind()

        def call(self, x):
            return self.layer(hidden_states=x, scale=2.0) if kind is Scaled else self.layer([x - 1.0, x])

    assert_only_damping_matters(Model, normal((16, 6), (16, 5)))


def test_state_and_losses_of_the_call_are_kept():
    """The count of calls is a weight, and the loss is part of the gradient."""

    def make():
        return keras.Sequential([keras.Input((8,)), Toy(), keras.layers.Flatten(), keras.layers.Dense(1)])

    assert_only_damping_matters(make, normal((12, 8), (12, 1)), batch_size=4)
    assert [status.reason for status in kernel_status(capture_inputs(make()))] == [None, None]


class Toys:
    """An adapter of `Toy` that conditions nothing."""

    def kernels(self, layer):
        return []

    def call(self, layer, conditioning_of, inputs):
        return layer.call(inputs)


class Experts(keras.layers.Layer):
    """Two kernels a group, `[experts, in, hidden]` and `[experts, hidden, out]`; every sample goes to one expert."""

    def build(self, input_shape):
        self.first = self.add_weight(shape=(3, input_shape[-1], 4), initializer="normal")
        self.second = self.add_weight(shape=(3, 4, 2), initializer="normal")

    def sent(self, inputs):
        return keras.ops.transpose(keras.ops.one_hot(keras.ops.argmax(inputs[:, :3], axis=-1), 3))

    def hidden(self, inputs):
        return keras.ops.relu(keras.ops.einsum("si,eih->esh", inputs, self.first))

    def call(self, inputs):
        outputs = keras.ops.einsum("esh,eho->eso", self.hidden(inputs), self.second)
        return keras.ops.sum(outputs * self.sent(inputs)[..., None], axis=0)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2)


def test_groups_are_conditioned_on_the_rows_that_are_sent_to_them():
    def rows_of_first(layer, inputs):
        return keras.ops.broadcast_to(inputs, (3, *inputs.shape)), layer.sent(inputs)

    def rows_of_second(layer, inputs):
        return layer.hidden(inputs), layer.sent(inputs)

    register_layer(Experts, "first", rows_of_first, groups=True)
    register_layer(Experts, "second", rows_of_second, groups=True)
    layer = Experts()
    layer.build((12, 5))
    random = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape))
    inputs, cotangent = (random.normal(size=shape).astype("float32") for shape in ((12, 5), (12, 2)))
    plain, conditioned = plain_and_conditioned(layer, inputs, cotangent)
    sent = inputs[:, :3].argmax(-1)
    first = keras.ops.convert_to_numpy(layer.first)
    for expert in range(3):
        rows = inputs[sent == expert]
        hidden = np.maximum(rows @ first[expert], 0)
        for actual, theirs, each in zip(conditioned, plain, (rows, hidden), strict=True):
            assert relative_error(actual[expert], oracle.condition(each, theirs[expert], 0.3)) < 2e-5
    assert [status.reason for status in kernel_status(layer)] == [None, None]


def test_error_registrations():
    with pytest.raises(TypeError, match=r"`layer_class` must be a subclass of `keras.Layer`\. Received: layer_class=3"):
        register_layer(3, "kernel", len)
    for kernel, rows in ((3, len), ("kernel", 3)):
        with pytest.raises(TypeError, match="`kernel` must be the name of an attribute and `rows` a function"):
            register_layer(Toy, kernel, rows)

    class Inheriting(Toy):
        pass

    for register in (lambda: register_layer(Inheriting, "weight", len), lambda: register_adapter(Inheriting, Toys())):
        with pytest.raises(ValueError, match=r"Inheriting inherits its `call` from Toy.*Register Toy, or write a `call` in"):
            register()
    with pytest.raises(TypeError, match=r"`adapter` must have the functions `kernels` and `call`\. Received: adapter=3"):
        register_adapter(Toy, 3)

    class Misread(Toy):
        def call(self, inputs):
            return super().call(inputs)

    register_layer(Misread, "weight", lambda layer, inputs: inputs[..., :7])
    layer = Misread()
    layer.build((5, 8))
    with pytest.raises(ValueError, match=r"rows registered for Misread layer .* do not fit its kernel"):
        run(capture_inputs(layer), np.ones((5, 8), "float32"), np.ones((5, 2, 3), "float32"), paper_isaac())


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_experts_of_keras_hub_train():
    hub = keras_hub()
    backbone = hub.models.MixtralBackbone(
        vocabulary_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=6,
        num_experts=3,
        top_k=1,
    )
    (block,) = (layer for layer, _ in walk(backbone) if hasattr(layer, "expert_bank"))

    def rows(block, inputs):
        rows = keras.ops.reshape(inputs, (-1, block.hidden_dim))
        _, chosen = keras.ops.top_k(block._sparse_feedforward_gate_dense(rows), k=block.top_k)
        sent = keras.ops.transpose(keras.ops.sum(keras.ops.one_hot(chosen, block.num_experts), axis=1))
        return keras.ops.repeat(rows[None], block.num_experts, axis=0), sent

    def hidden(block, inputs):
        bank, (rows_of_all, sent) = block.expert_bank, rows(block, inputs)
        gate = keras.ops.matmul(rows_of_all, bank._expert_feedforward_gate_dense)
        return keras.ops.matmul(rows_of_all, bank._expert_feedforward_intermediate_dense) * bank.activation(gate), sent

    register_layer(type(block), "expert_bank._expert_feedforward_gate_dense", rows, groups=True)
    register_layer(type(block), "expert_bank._expert_feedforward_intermediate_dense", rows, groups=True)
    register_layer(type(block), "expert_bank._expert_feedforward_output_dense", hidden, groups=True)
    tokens = backbone.input
    model = captured(ISAAC(0.01), keras.Model(tokens, keras.layers.Dense(3)(backbone(tokens)[:, -1])))
    reasons = [status.reason for status in kernel_status(model) if "expert_feedforward" in status.path]
    assert reasons == [None] * 3
    random = np.random.default_rng(0)
    inputs = {"token_ids": random.integers(0, 16, (8, 5)), "padding_mask": np.ones((8, 5), "int32")}
    losses = fit(model, (inputs, random.normal(size=(8, 3))), epochs=8).history["loss"]
    assert losses[-1] < losses[0]
