"""The methods of the experiments: how each optimizer is made, and where the search for its best setting starts."""

import dataclasses
import functools
from typing import NamedTuple

from baselines import SOAP, Muon
from keras.optimizers import SGD, AdamW, Lion, ScheduleFreeAdamW

from keras_isaac import ISAAC


class Method(NamedTuple):
    """How an optimizer is made, and where the search for its best setting starts.

    Args:
        make: function without arguments, returns the optimizer; `None` for K-FAC, whose trainer needs none.
        learning_rate: float, where the search starts.
        second: float, the same of the damping of ISAAC, or of the weight decay of another optimizer.
        damping: float, of ISAAC where the second number is its inner optimizer's weight decay. Defaults to `None`: it is not.
        tunes_damping: boolean, whether that damping is where the search of a third number starts. Defaults to `False`.
        is_constant: boolean, whether the learning rate stays after the warm-up.
        damping_power: float; the damping is multiplied by the schedule of the learning rate (of 1 at its peak) to this power.
        trainer: name of the module, and of the class in it, that trains by this method. Defaults to that of `evidence.py`.
        is_tuned: boolean, whether other settings than the first are tried. Defaults to `True`.
        exclude: regular expression of the paths of layers that ISAAC leaves plain. Defaults to `None`: none.
    """

    make: object
    learning_rate: float
    second: float
    damping: float | None = None
    tunes_damping: bool = False
    is_constant: bool = False
    damping_power: float = 0.0
    trainer: str = "evidence.Trainer"
    is_tuned: bool = True
    exclude: str | None = None

    @property
    def start(self):
        """The first setting."""
        return (self.learning_rate, self.second, *([self.damping] if self.tunes_damping else ()))


class FirstFactor(ISAAC):
    """ISAAC that leaves the second of LoRA's factors plain."""

    def conditioning_of_step(self, *args, **kwargs):
        """Returns what is asked of the layers in this step."""
        conditioning = super().conditioning_of_step(*args, **kwargs)
        return dataclasses.replace(
            conditioning, trains=lambda kernel: conditioning.trains(kernel) and "lora_kernel_b" not in kernel.path
        )


# Where the damping is searched, the weight decay is AdamW's own default.
around_adamw = functools.partial(ISAAC, weight_decay=0.004)


# Tables and the last layer, which Muon leaves to AdamW.
NOT_HIDDEN = "embedding|logits"


def muon():
    """Returns Muon."""
    return Muon(exclude=NOT_HIDDEN)


def around_muon():
    """Returns ISAAC around it."""
    return ISAAC(inner_optimizer=muon())


METHODS = {
    "AdamW": Method(AdamW, 1e-3, 0.004),
    "Muon": Method(muon, 1e-3, 0.004),
    "SOAP": Method(SOAP, 3e-3, 0.01),
    # Its defaults.
    "ISAAC()": Method(ISAAC, 1e-3, 0.004, damping=1.0, is_tuned=False),
    "ISAAC + AdamW": Method(around_adamw, 1e-3, 1.0),
    "ISAAC + Muon": Method(around_muon, 1e-3, 1.0),
    "ISAAC + SOAP": Method(lambda: ISAAC(inner_optimizer=SOAP()), 3e-3, 1.0),
    "ISAAC + AdamW, decay": Method(ISAAC, 3e-3, 0.04, damping=0.3),
    "ISAAC + AdamW, all": Method(ISAAC, 3e-3, 0.4, damping=1.0, tunes_damping=True),
    "ISAAC + Muon, decay": Method(around_muon, 3e-3, 0.04, damping=0.3),
    "ISAAC + Muon, hidden": Method(around_muon, 3e-3, 0.04, damping=0.3, exclude=f".*({NOT_HIDDEN}).*"),
    "ISAAC + Muon, all": Method(around_muon, 3e-3, 0.04, damping=1.0, tunes_damping=True),
    "momentum": Method(lambda: SGD(momentum=0.9, weight_decay=0.0), 0.1, 1e-4),
    "Lion": Method(Lion, 1e-4, 0.1),
    "ScheduleFreeAdamW": Method(lambda: ScheduleFreeAdamW(weight_decay=0.0), 0.003, 0.01, is_constant=True),
    "K-FAC": Method(None, 0.3, 0.1, trainer="kfac.KfacTrainer"),
    "falling damping": Method(around_adamw, 1e-3, 1.0, damping_power=1.0),
    "rising damping": Method(around_adamw, 1e-3, 1.0, damping_power=-1.0),
    "first factor": Method(functools.partial(FirstFactor, weight_decay=0.004), 1e-3, 1.0),
    "memory + AdamW": Method(around_adamw, 1e-3, 1.0, trainer="variants.MemoryTrainer"),
    "short memory": Method(around_adamw, 1e-3, 1.0, trainer="variants.ShortMemoryTrainer"),
    "memory + Muon": Method(around_muon, 1e-3, 1.0, trainer="variants.MemoryTrainer"),
    "amortized": Method(around_adamw, 1e-3, 1.0, trainer="variants.AmortizedTrainer"),
    "mean row": Method(around_adamw, 1e-3, 1.0, trainer="variants.MeanRowTrainer"),
    "after momentum": Method(functools.partial(around_adamw, beta_1=0.0), 1e-3, 1.0, trainer="variants.LateTrainer"),
    "damping by signal": Method(around_adamw, 1e-3, 1.0, trainer="variants.SignalTrainer"),
    "cross-fitting": Method(around_adamw, 1e-3, 1.0, trainer="variants.CrossFittingTrainer"),
    "whitened Muon": Method(around_muon, 3e-3, 0.04, damping=1.0, trainer="variants.WhitenedTrainer"),
}
# What was tried to better ISAAC, and is compared with it alone.
TRIED = (
    "falling damping",
    "rising damping",
    "first factor",
    "memory + AdamW",
    "short memory",
    "memory + Muon",
    "amortized",
    "mean row",
    "after momentum",
    "damping by signal",
    "ISAAC + SOAP",
    "cross-fitting",
    "whitened Muon",
)
# It is of dense layers, and trains the paper's networks.
KFAC_TASKS = ("classifier", "autoencoder")
