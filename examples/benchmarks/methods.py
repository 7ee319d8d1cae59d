"""The methods of the experiments: how each optimizer is made, and where the search for its best setting starts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
from baselines import SOAP, Muon
from keras.optimizers import SGD, AdamW, Lion, ScheduleFreeAdamW

from keras_isaac import ISAAC


class Method(NamedTuple):
    """An optimizer and the first setting of its search.

    Args:
        make: function without arguments, returns the optimizer; `None` for K-FAC, whose trainer needs none.
        learning_rate: float, where the search starts.
        second: float, the same for the weight decay (for K-FAC: the damping).
        damping: float, the same for the damping of ISAAC, a third number. Defaults to `None`: there is none.
        is_constant: boolean, whether the learning rate stays constant after the warm-up. Defaults to `False`.
        trainer: module and class that train by this method. Defaults to the class of `evidence.py`.
    """

    make: Callable | None
    learning_rate: float
    second: float
    damping: float | None = None
    is_constant: bool = False
    trainer: str = "evidence.Trainer"

    @property
    def start(self):
        """The first setting."""
        return self.learning_rate, self.second, *(() if self.damping is None else (self.damping,))


# Muon leaves embeddings and the last layer to AdamW, as its authors do.
muon = functools.partial(Muon, exclude="embedding|logits")
# The results of the two tuned methods were made with this number of rows, the default of version 0.2.
isaac = functools.partial(ISAAC, max_rows=1024)

METHODS = {
    "AdamW": Method(AdamW, 1e-3, 0.004),
    "Muon": Method(muon, 1e-3, 0.004),
    "Keras Muon": Method(keras.optimizers.Muon, 1e-3, 0.004),
    "SOAP": Method(SOAP, 3e-3, 0.01),
    "momentum": Method(lambda: SGD(momentum=0.9, weight_decay=0.0), 0.1, 1e-4),
    "Lion": Method(Lion, 1e-4, 0.1),
    "ScheduleFreeAdamW": Method(lambda: ScheduleFreeAdamW(weight_decay=0.0), 0.003, 0.01, is_constant=True),
    "K-FAC": Method(None, 0.3, 0.1, trainer="kfac.KfacTrainer"),
    "ISAAC + AdamW, tuned": Method(isaac, 3e-3, 0.4, damping=1.0),
    "ISAAC + Muon, tuned": Method(lambda: isaac(inner_optimizer=muon()), 3e-3, 0.04, damping=1.0),
}
# What `swap.py` wraps in ISAAC; the first three also at the optimizer's own defaults, which no task has tuned.
BASES = ("AdamW", "Muon", "Keras Muon", "SOAP", "momentum", "Lion", "ScheduleFreeAdamW")
WITH_DEFAULTS = ("AdamW", "Keras Muon")
# It supports dense layers only.
KFAC_TASKS = ("classifier", "autoencoder")
