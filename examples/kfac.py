"""K-FAC from a published package, curvlinops (PyTorch), on the dense tasks of `evidence.py`, which runs it as a method.

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
from evidence import Trainer, batches


class KfacTrainer(Trainer):
    """A trainer of one task with K-FAC, in PyTorch."""

    def __init__(self, task):
        self.task = task
        self.is_classifier = task.metric == "accuracy"
        self.loss_fn = torch.nn.CrossEntropyLoss() if self.is_classifier else torch.nn.MSELoss()
        self.train_data, self.test_data = ([torch.as_tensor(each) for each in part] for part in task.data())
        self.train_data[0], self.test_data[0] = (x.flatten(1) for x in (self.train_data[0], self.test_data[0]))
        if self.is_classifier:
            self.train_data[1], self.test_data[1] = self.train_data[1].long(), self.test_data[1].long()

    def reset(self, learning_rate, damping, seed):
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
        self.model = torch.nn.Sequential(*layers)
        self.learning_rate, self.damping = learning_rate, 1.0 if damping is None else damping

    def fit(self, first_step, last_step, seed):
        """Trains some steps."""
        x, y = self.train_data
        order = torch.as_tensor(batches(self.task, len(x), first_step, last_step, seed))
        try:
            for places in order.split(self.task.batch_size):
                self.step(x[places], y[places])
        except torch.linalg.LinAlgError:
            # What the package cannot factorize has diverged.
            for parameter in self.model.parameters():
                parameter.detach().fill_(math.nan)

    def step(self, x, y):
        """Trains one step."""
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(self.loss_fn(self.model(x), y), parameters)
        options = {"check_deterministic": False, "num_data": len(x), "num_per_example_loss_terms": 1}
        options["seed"] = int(torch.randint(2**31 - 1, ()))
        curvature = KFACLinearOperator(self.model, self.loss_fn, parameters, [(x, y)], **options)
        inverse = KFACInverseLinearOperator(curvature, self.damping, use_heuristic_damping=True)
        steps = inverse @ list(gradients)
        lengths = [math.sqrt(sum(float((each**2).sum()) for each in tensors)) for tensors in (gradients, steps)]
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter -= self.learning_rate * lengths[0] / max(lengths[1], 1e-30) * step

    def evaluate(self, x, y):
        """Returns loss and metric."""
        with torch.no_grad():
            outputs = self.model(x)
            result = {"loss": float(self.loss_fn(outputs, y))}
        if self.is_classifier:
            result["accuracy"] = float((outputs.argmax(-1) == y).float().mean())
        return result
