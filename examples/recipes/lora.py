"""LoRA fine-tuning of a KerasHub language model, with ISAAC and with AdamW.

    python lora.py --backend jax

Nothing is downloaded: a small GPT-2 of characters learns Python's help texts, and then, by LoRA, Python's own source. For a
model of KerasHub's own, write `keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")` and its tokenizer instead.
"""

import argparse
import inspect
import os
import pydoc_data.topics

import numpy as np

LENGTH = 64
LAYERS = ["query", "value", "feedforward_intermediate_dense", "feedforward_output_dense"]


def parse_arguments():
    """Reads the command line, and sets what Keras reads when it is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's")
    parser.add_argument("--width", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2048, help="to learn before LoRA (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of LoRA (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    return arguments


def windows(text):
    """Returns inputs of the model, pieces of a text in a random order, and the same one character further."""
    codes = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32")
    count = (len(codes) - 1) // LENGTH
    # Keras does not shuffle what KerasHub hands it.
    order = np.random.default_rng(0).permutation(count)
    tokens, targets = (codes[start : start + count * LENGTH].reshape(count, LENGTH)[order] for start in (0, 1))
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, targets


def main():
    """Learns the help texts, then the source by LoRA under each optimizer, and prints the losses."""
    arguments = parse_arguments()
    import keras
    from keras_hub.models import GPT2Backbone, GPT2CausalLM

    from keras_isaac import ISAAC, capture_inputs, summary

    keras.utils.set_random_seed(0)
    backbone = GPT2Backbone(
        vocabulary_size=128,
        num_layers=2,
        num_heads=4,
        hidden_dim=arguments.width,
        intermediate_dim=4 * arguments.width,
        max_sequence_length=LENGTH,
    )
    model = GPT2CausalLM(backbone, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss)
    help_text = "".join(pydoc_data.topics.topics.values())
    model.fit(*windows(help_text[: arguments.samples * LENGTH + 1]), batch_size=16, shuffle=False, verbose=0)

    text = inspect.getsource(argparse)[:20_000]
    split = len(text) * 4 // 5
    training, held_out = windows(text[:split]), windows(text[split:])
    print(f"held-out loss of the source before LoRA: {model.evaluate(*held_out, verbose=0)[0]:.3f}")
    backbone.enable_lora(arguments.rank, LAYERS)
    start = model.get_weights()
    model = capture_inputs(model)
    for optimizer in (keras.optimizers.AdamW(3e-2), ISAAC(3e-2, weight_decay=0.004)):
        model.set_weights(start)
        model.compile(optimizer, loss)
        model.fit(*training, batch_size=8, epochs=arguments.epochs, shuffle=False, verbose=0)
        print(f"after {arguments.epochs} epochs of {type(optimizer).__name__}: {model.evaluate(*held_out, verbose=0)[0]:.3f}")
    summary(model, inputs={name: values[:8] for name, values in training[0].items()})


if __name__ == "__main__":
    main()
