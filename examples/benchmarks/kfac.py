"""K-FAC of the package curvlinops (PyTorch), as a method of `evidence.py` for tasks of dense layers.

    pip install torch curvlinops-for-pytorch
    python evidence.py --tasks classifier,autoencoder --methods K-FAC

The curvature is that of each batch, with one label sampled for each row, as the ISAAC paper compares with; its damping is split
over the two factors as Martens and Grosse (2015) do, and SGD takes the result, scaled to the length of the plain gradient, so
that the learning rates of SGD suit it.
"""

import math

import numpy as np
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from evidence import Trainer


class KfacTrainer(Trainer):
    """A trainer of one task with K-FAC, in PyTorch."""

    def __init__(self, task, method):
        self.task, self.method = task, method
        self.is_classifier = "accuracy" in task.measures
        self.loss_fn = torch.nn.CrossEntropyLoss() if self.is_classifier else torch.nn.MSELoss()
        parts = [[torch.as_tensor(each) for each in part] for part in task.data()]
        self.parts = [(x.flatten(1), y.long() if self.is_classifier else y) for x, y in parts]

    def start(self, seed):
        """Builds the task's model in PyTorch, with its weights."""
        torch.manual_seed(seed)
        layers = []
        for layer in self.task.build(seed).layers:
            if layer.weights:
                kernel, bias = (torch.as_tensor(np.array(weight)) for weight in layer.get_weights())
                linear = torch.nn.Linear(*kernel.shape)
                with torch.no_grad():
                    linear.weight.copy_(kernel.T)
                    linear.bias.copy_(bias)
                layers += [linear] if layer.activation.__name__ == "linear" else [linear, torch.nn.ReLU()]
        return torch.nn.Sequential(*layers)

    def step(self, model, number, places, setting, total, x, y):
        """Trains one step; returns the model, and the batch's loss."""
        (learning_rate, damping), places = setting, torch.as_tensor(places)
        x, y = x[places], y[places]
        parameters = list(model.parameters())
        loss = self.loss_fn(model(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        options = {"check_deterministic": False, "num_data": len(x), "num_per_example_loss_terms": 1}
        options["seed"] = int(torch.randint(2**31 - 1, ()))
        try:
            curvature = KFACLinearOperator(model, self.loss_fn, parameters, [(x, y)], **options)
            steps = KFACInverseLinearOperator(curvature, damping, use_heuristic_damping=True) @ list(gradients)
        except torch.linalg.LinAlgError:
            # What the package cannot factorize has diverged.
            return model, math.nan
        lengths = [math.sqrt(sum(float((each**2).sum()) for each in tensors)) for tensors in (gradients, steps)]
        scale = learning_rate * float(self._schedule(number, total)) * lengths[0] / max(lengths[1], 1e-30)
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter -= scale * step
        return model, float(loss.detach())

    def evaluate(self, model, x, y):
        """Returns loss and metric."""
        with torch.no_grad():
            outputs = model(x)
            result = {"loss": float(self.loss_fn(outputs, y))}
        if self.is_classifier:
            result["accuracy"] = float((outputs.argmax(-1) == y).float().mean())
        return result
