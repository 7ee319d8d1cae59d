"""LoRA fine-tuning of a KerasHub language model, with AdamW and with ISAAC.

    python lora.py

Nothing is downloaded: a small GPT-2 of characters learns Python's help texts first, and then, by LoRA, Python source. For a
pretrained model, write `keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")` and use its tokenizer.
"""

import argparse
import inspect
import pydoc_data.topics

import keras
import numpy as np
from keras_hub.models import GPT2Backbone, GPT2CausalLM

from keras_isaac import ISAAC, capture_inputs, summary

LENGTH, WIDTH, SAMPLES, EPOCHS = 64, 128, 2048, 10
LAYERS = ["query", "value", "feedforward_intermediate_dense", "feedforward_output_dense"]


def windows(text):
    """Returns the model's inputs, pieces of a text in random order, and the same pieces one character later."""
    codes = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32")
    count = (len(codes) - 1) // LENGTH
    order = np.random.default_rng(0).permutation(count)
    tokens, targets = (codes[start : start + count * LENGTH].reshape(count, LENGTH)[order] for start in (0, 1))
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, targets


keras.utils.set_random_seed(0)
backbone = GPT2Backbone(
    vocabulary_size=128,
    num_layers=2,
    num_heads=4,
    hidden_dim=WIDTH,
    intermediate_dim=4 * WIDTH,
    max_sequence_length=LENGTH,
)
model = GPT2CausalLM(backbone, preprocessor=None)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.AdamW(3e-3), loss)
help_text = "".join(pydoc_data.topics.topics.values())
model.fit(*windows(help_text[: SAMPLES * LENGTH + 1]), batch_size=16, shuffle=False, verbose=0)

source = inspect.getsource(argparse)[:20_000]
training, held_out = windows(source[:16_000]), windows(source[16_000:])
print(f"held-out loss of the source before LoRA: {model.evaluate(*held_out, verbose=0)[0]:.3f}")

# First LoRA, then capture: the factors are captured too.
backbone.enable_lora(4, LAYERS)
model = capture_inputs(model)
start = model.get_weights()
for optimizer in (keras.optimizers.AdamW(3e-2), ISAAC(3e-2)):
    model.set_weights(start)
    model.compile(optimizer, loss)
    model.fit(*training, batch_size=8, epochs=EPOCHS, shuffle=False, verbose=0)
    print(f"after {EPOCHS} epochs of {type(optimizer).__name__}: {model.evaluate(*held_out, verbose=0)[0]:.3f}")
summary(model, inputs={name: values[:8] for name, values in training[0].items()})
