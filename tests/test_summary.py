import keras
from keras import layers

from keras_isaac import capture_inputs, kernel_status


def test_every_kernel_is_accounted_for():
    inputs = keras.Input((8, 6))
    hidden = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    hidden = layers.LayerNormalization()(hidden)
    hidden = layers.LSTM(4, name="lstm")(hidden)
    hidden = layers.Dense(4, name="frozen", trainable=False)(hidden)
    hidden = layers.Dense(4, name="excluded")(hidden)
    low_rank = layers.Dense(4, name="lora")
    model = keras.Model(inputs, layers.Dense(2, name="head")(low_rank(hidden)))
    low_rank.enable_lora(2)
    assert {status.reason for status in kernel_status(model) if "head" in status.path} == {"not captured"}
    capture_inputs(model, exclude="excluded")
    reasons = {status.path: status.reason for status in kernel_status(model)}
    assert set(reasons) == {w.path for w in model.weights if len(w.shape) >= 2 and w.name != "bias"}
    assert [reasons[f"attention/{part}/kernel"] for part in ("query", "key", "value", "attention_output")] == [None] * 4
    assert reasons["lstm/lstm_cell/recurrent_kernel"] == "no conditioned form of LSTMCell"
    assert reasons["frozen/kernel"] == reasons["lora/kernel"] == "frozen"
    assert reasons["excluded/kernel"] == "not captured"
    assert reasons["lora/lora_kernel_a"] is None
    assert reasons["lora/lora_kernel_b"] == "does not meet the layer's inputs in a product"
    assert reasons["head/kernel"] is None
