import inspect

import keras
import numpy as np
import pytest
from harness import BACKEND, KERAS_VERSION, each_mode, paper_isaac, run, to_numpy
from keras.optimizers import SGD, Adam, LossScaleOptimizer
from keras.optimizers.schedules import ExponentialDecay, PiecewiseConstantDecay
from models import assert_close, assert_differ, captured, fit, mlp, regression, trained, weights

from keras_isaac import ISAAC, capture_inputs
from keras_isaac.keras_hooks import has_several, isaacs_in


@pytest.mark.parametrize(
    ("arguments", "inner", "learning_rate"),
    [
        ({}, keras.optimizers.AdamW, 0.001),
        ({"learning_rate": 0.5}, keras.optimizers.AdamW, 0.5),
        ({"inner_optimizer": "adam"}, Adam, 0.001),
        ({"inner_optimizer": "adam", "learning_rate": 0.01}, Adam, 0.01),
        ({"inner_optimizer": Adam, "learning_rate": 0.01}, Adam, 0.01),
        ({"inner_optimizer": SGD}, SGD, 0.1),
    ],
    ids=str,
)
def test_inner_optimizer_by_name_and_class(arguments, inner, learning_rate):
    optimizer = ISAAC(**arguments)
    assert isinstance(optimizer.inner_optimizer, inner)
    assert float(to_numpy(optimizer.learning_rate)) == pytest.approx(learning_rate)


def test_inner_optimizer_instance_and_keyword_arguments():
    adam = Adam(1e-3)
    assert ISAAC(inner_optimizer=adam).inner_optimizer is adam
    momentum = ISAAC(inner_optimizer="sgd", momentum=0.9, clipnorm=1.0, weight_decay=0.1)
    assert momentum.inner_optimizer.get_config()["momentum"] == 0.9
    positional = ISAAC(0.5, 2.0, "adam", "mine")
    assert (float(to_numpy(positional.damping)), positional.name) == (2.0, "mine")


@pytest.mark.parametrize("inner_optimizer", [keras.optimizers.AdamW, Adam, keras.optimizers.Lion])
def test_by_name_by_class_and_as_an_instance_it_is_the_same_optimizer(inner_optimizer):
    name = inner_optimizer.__name__.lower()
    configs = []
    for given in (name, inner_optimizer, inner_optimizer()):
        inner = ISAAC(inner_optimizer=given).get_config()["inner_optimizer"]
        configs.append({**inner, "config": {**inner["config"], "name": None}})
    assert configs[0] == configs[1] == configs[2]


def test_defaults():
    config = ISAAC().get_config()
    assert (config["damping"], config["relative_damping"], config["preserve_norm"]) == (1.0, True, False)
    inner = [ISAAC(), ISAAC(weight_decay=0.01), ISAAC(inner_optimizer=keras.optimizers.AdamW())]
    assert [isaac.inner_optimizer.weight_decay for isaac in inner] == [0.004, 0.01, 0.004]


@pytest.mark.parametrize("damping", [0, 0.0, -1.0, float("nan"), float("inf"), "one", None, True, [1.0], np.float32(-1)])
def test_error_damping_that_is_no_positive_number(damping):
    with pytest.raises(ValueError, match=r"`damping` must be a finite number above 0 .* Received: damping="):
        paper_isaac(damping=damping)
    with pytest.raises(ValueError, match="`damping` must be a finite number above 0"):
        paper_isaac().damping = damping


@pytest.mark.parametrize("damping", [0.5, 2, np.float32(0.25), np.float64(4)])
def test_damping_reads_and_sets(damping):
    optimizer = paper_isaac(damping=damping)
    assert float(to_numpy(optimizer.damping)) == damping
    optimizer.damping = 3.0
    assert float(to_numpy(optimizer.damping)) == 3.0
    optimizer.damping = np.float32(1.5)
    assert float(to_numpy(optimizer.damping)) == 1.5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("damping", [1e-8, 1.01e-6])
@each_mode
def test_layers_do_not_round_the_damping_to_their_compute_dtype(policy, damping, compiled):
    model = capture_inputs(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, dtype=policy)]))
    inputs, cotangent = np.full((2, 1), 2.0**-10, "float32"), np.full((2, 1), 2.0**10, "float32")
    gradient = run(model, inputs, cotangent, paper_isaac(damping=damping), compiled).gradients[0]
    assert gradient[0, 0] == pytest.approx(2 * damping / (damping + 2.0**-20), rel=2.0**-8)


def test_error_a_schedule_is_not_settable():
    schedule = ExponentialDecay(1.0, 10, 0.5)
    for optimizer, damping in ((paper_isaac(damping=schedule), 1.0), (paper_isaac(), schedule)):
        with pytest.raises(TypeError, match="Compile the model with a new"):
            optimizer.damping = damping


def test_damping_schedule_moves_inside_a_compiled_fit():
    data = regression()
    schedule = PiecewiseConstantDecay([2], [0.05, 1e8])
    scheduled = trained(paper_isaac(damping=schedule), capture_inputs, data, epochs=3)
    model = captured(paper_isaac(damping=0.05))
    for step in range(9):
        batch = slice(step % 3 * 16, step % 3 * 16 + 16)
        # Keras' piecewise schedule changes after its boundary: steps 0, 1 and 2 have the first value.
        model.optimizer.damping = 0.05 if step <= 2 else 1e8
        model.train_on_batch(data[0][batch], data[1][batch])
    assert_close(scheduled, weights(model))
    assert_differ(scheduled, trained(paper_isaac(damping=0.05), capture_inputs, data, epochs=3))


@pytest.mark.often("*nesterov", "*learning_rate-clipnorm", "*ema_momentum", "*accumulation_steps")
@pytest.mark.parametrize(
    "inner",
    [
        {"inner_optimizer": "sgd", "momentum": 0.9, "nesterov": True},
        {"inner_optimizer": "adam", "learning_rate": 0.01, "clipnorm": 0.05},
        {"inner_optimizer": "sgd", "global_clipnorm": 0.05},
        {"inner_optimizer": "sgd", "weight_decay": 0.1},
        {"inner_optimizer": "adam", "use_ema": True, "ema_momentum": 0.5},
        {"inner_optimizer": "sgd", "gradient_accumulation_steps": 3},
        {"inner_optimizer": "rmsprop"},
        {"inner_optimizer": "sgd", "learning_rate": ExponentialDecay(0.2, 2, 0.5)},
        {"inner_optimizer": "sgd", "loss_scale_factor": 8.0},
    ],
    ids=lambda inner: "-".join(inner),
)
def test_huge_damping_is_the_inner_optimizer(inner):
    arguments = {"learning_rate": 0.1, **inner}
    name = arguments.pop("inner_optimizer")
    plain = trained(
        getattr(keras.optimizers, {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop"}[name])(**arguments), epochs=3
    )
    isaac = trained(paper_isaac(damping=1e8, inner_optimizer=name, **arguments), capture_inputs, epochs=3)
    assert_close(isaac, plain, 1e-5)
    assert_differ(trained(paper_isaac(damping=0.1, inner_optimizer=name, **arguments), capture_inputs, epochs=3), plain)


def test_iterations_are_the_inner_optimizers():
    model = captured(paper_isaac())
    fit(model, regression(), epochs=2)
    assert int(to_numpy(model.optimizer.iterations)) == int(to_numpy(model.optimizer.inner_optimizer.iterations)) == 6


def test_the_learning_rate_is_read_and_set_by_callbacks():
    model = captured(paper_isaac(learning_rate=0.5))
    fit(model, regression(), epochs=3, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)])
    assert float(to_numpy(model.optimizer.learning_rate)) == 0.0625
    model.optimizer.learning_rate = 0.3
    assert float(to_numpy(model.optimizer.inner_optimizer.learning_rate)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: paper_isaac(),
        lambda: paper_isaac(0.2, 0.3, "adam", beta_1=0.8, clipnorm=1.0),
        lambda: paper_isaac(damping=ExponentialDecay(1.0, 10, 0.5), per_replica=True),
        lambda: paper_isaac(learning_rate=ExponentialDecay(0.1, 10, 0.5), name="named"),
        lambda: paper_isaac(inner_optimizer=keras.optimizers.Lion(0.01)),
        lambda: ISAAC(preserve_norm=True, output_damping=0.5, weight_sharing="reduce", max_rows=7),
    ],
    ids=["default", "arguments", "damping schedule", "learning rate schedule", "instance", "options"],
)
def test_config_round_trip(optimizer):
    optimizer = optimizer()
    assert inspect.signature(ISAAC).parameters.keys() - {"kwargs"} <= optimizer.get_config().keys()
    for copy in (
        ISAAC.from_config(optimizer.get_config()),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
        keras.optimizers.get(keras.optimizers.serialize(optimizer)),
    ):
        assert copy.get_config() == optimizer.get_config()
        assert type(copy.inner_optimizer) is type(optimizer.inner_optimizer)


@pytest.mark.skipif(KERAS_VERSION >= (3, 16), reason="since Keras 3.16 a name is one of Keras' own optimizers")
def test_compile_by_name():
    model = captured("isaac")
    assert type(model.optimizer) is ISAAC
    fit(model, regression())


WRAPPERS = {"isaac": lambda isaac: isaac, "loss scale": LossScaleOptimizer}
if hasattr(keras.optimizers, "MultiOptimizer"):
    WRAPPERS["several"] = lambda isaac: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(SGD(0.1), {".*": isaac}))


@pytest.mark.often("False-*")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_callbacks_see_the_moving_average_inside_other_optimizers(wrapper, swap_on_epoch):
    """The average of the weights is evaluated: that of the inner optimizer."""

    def history(optimizer, capture):
        model = capture(mlp())
        model.compile(optimizer=WRAPPERS[wrapper](optimizer), loss="mse")
        callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)]
        history = fit(model, regression(), epochs=3, validation_data=regression(16, seed=1), callbacks=callbacks)
        return [np.asarray(history.history["val_loss"]), *weights(model)]

    plain = history(SGD(0.1, use_ema=True, ema_momentum=0.5), lambda model: model)
    assert_close(history(paper_isaac(0.1, 1e8, use_ema=True, ema_momentum=0.5), capture_inputs), plain, 1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_callbacks_say_that_there_is_no_moving_average(wrapper):
    model = captured(WRAPPERS[wrapper](paper_isaac()))
    with pytest.raises(ValueError, match=r"SwapEMAWeights must be used when .*use_ema=True"):
        fit(model, regression(), validation_data=regression(16), callbacks=[keras.callbacks.SwapEMAWeights()])


@pytest.mark.parametrize("learning_rate", [0.25, ExponentialDecay(0.5, 10, 0.5)], ids=["number", "schedule"])
@pytest.mark.parametrize("by_instance", [False, True])
def test_the_config_shows_the_learning_rate_and_takes_another(learning_rate, by_instance):
    isaac = ISAAC(inner_optimizer=Adam(learning_rate)) if by_instance else ISAAC(learning_rate)
    config = isaac.get_config()
    assert config["learning_rate"] == isaac.inner_optimizer.get_config()["learning_rate"]
    assert float(to_numpy(ISAAC.from_config({**config, "learning_rate": 0.125}).learning_rate)) == 0.125


def test_the_config_names_a_class_that_every_backend_has():
    config = ISAAC().get_config()["inner_optimizer"]
    assert (config["module"], config["class_name"], config["registered_name"]) == ("keras.optimizers", "AdamW", None)

    class AdamW(keras.optimizers.AdamW):
        """A user's class of the same name."""

    assert ISAAC(inner_optimizer=AdamW()).get_config()["inner_optimizer"]["module"] != "keras.optimizers"


class Outer(keras.optimizers.Optimizer):
    """An optimizer as users write it around another one."""

    def __init__(self, attribute, inner, holder=lambda inner: inner):
        super().__init__(learning_rate=0.0)
        self.attribute = attribute
        setattr(self, attribute, holder(inner))
        self.get_inner = lambda: inner

    def build(self, variables):
        self.get_inner().build(variables)
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        self.get_inner().apply(grads, trainable_variables)

    @property
    def variables(self):
        return self._variables + (self.get_inner().variables if hasattr(self, "get_inner") else [])


HOLDERS = {"itself": lambda inner: inner, "list": lambda inner: [inner], "dictionary": lambda inner: {"all": (inner,)}}


@pytest.mark.often("itself-optimizer", "list-_base")
@pytest.mark.parametrize("attribute", ["optimizer", "_base"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_optimizer_around_isaac_conditions_whatever_its_attribute(attribute, holder):
    outer = Outer(attribute, paper_isaac(damping=0.1), HOLDERS[holder])
    assert_close(trained(outer, capture_inputs), trained(paper_isaac(damping=0.1), capture_inputs))


def test_a_subclass_made_of_the_config_conditions():
    """As `horovod.keras.DistributedOptimizer` makes it."""
    isaac, calls = paper_isaac(damping=0.1, momentum=0.9), []

    class Distributed(keras.optimizers.Optimizer):
        def apply(self, grads, trainable_variables=None):
            calls.append(len(grads))
            super(self.__class__, self).apply(grads, trainable_variables)

    subclass = type(type(isaac).__name__, (type(isaac),), {"apply": Distributed.apply})
    optimizer = subclass.from_config(isaac.get_config())
    assert type(optimizer) is subclass
    assert_close(trained(optimizer, capture_inputs), trained(isaac, capture_inputs), 0)
    assert calls


def test_found_inside_other_optimizers():
    isaac, sgd = paper_isaac(), SGD()
    assert isaacs_in(isaac) == [isaac]
    assert isaacs_in(LossScaleOptimizer(isaac)) == [isaac]
    assert isaacs_in(LossScaleOptimizer(Outer("optimizer", isaac))) == [isaac]
    assert isaacs_in(sgd) == isaacs_in(None) == isaacs_in("adam") == []
    cycle = Outer("first", isaac)
    cycle.second = Outer("back", cycle)
    assert isaacs_in(cycle) == [isaac]
    assert not has_several(LossScaleOptimizer(isaac))
    assert has_several(Outer("both", [isaac, sgd]))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="an older Keras has no MultiOptimizer")
def test_inside_a_multi_optimizer_only_its_own_variables_are_conditioned():
    def multi(head):
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(SGD(0.1), {".*head.*": head}))

    data = regression(16)
    mixed = trained(multi(paper_isaac(damping=0.1)), capture_inputs, data)
    plain = trained(SGD(0.1), None, data)
    isaac = trained(paper_isaac(damping=0.1), capture_inputs, data)
    assert_close(mixed, plain[:2] + isaac[2:])
    assert_differ(mixed[2:], plain[2:])


def test_inside_a_loss_scale_optimizer():
    scaled = trained(LossScaleOptimizer(paper_isaac(damping=0.1)), capture_inputs)
    assert_close(scaled, trained(paper_isaac(damping=0.1), capture_inputs), 1e-5)


def test_exclude_from_weight_decay_reaches_the_inner_optimizer():
    def decayed(optimizer):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    plain = trained(decayed(SGD(0.1, weight_decay=0.5)))
    assert_close(trained(decayed(paper_isaac(0.1, 1e8, weight_decay=0.5)), capture_inputs), plain, 1e-5)


def test_variables_are_saved_once_and_set_in_order():
    optimizer = paper_isaac(damping=0.5, inner_optimizer="adam")
    optimizer.build(mlp().trainable_variables)
    assert len(optimizer.variables) == len({id(v) for v in optimizer.variables})
    assert optimizer.variables[0] is optimizer.damping
    values = [to_numpy(v) + 1 for v in optimizer.variables]
    optimizer.set_weights(values)
    assert_close([to_numpy(v) for v in optimizer.variables], values)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX is stateless: see test_loops.py")
def test_apply_gradients_returns_the_iterations():
    model = capture_inputs(mlp())
    optimizer = paper_isaac()
    with optimizer.conditioning():
        model(np.ones((2, 6), "float32"))
    assert int(to_numpy(optimizer.apply_gradients([(v.value * 0, v) for v in model.trainable_variables]))) == 1
