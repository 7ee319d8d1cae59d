import keras
import numpy as np
import oracle
import pytest
from harness import BACKEND, KERAS_VERSION, paper_isaac, to_numpy
from keras.optimizers import SGD, Adam, LossScaleOptimizer
from models import (
    COPIES,
    Subclassed,
    assert_close,
    assert_differ,
    assert_only_damping_matters,
    captured,
    fit,
    mlp,
    regression,
    trained,
    weights,
    with_random_weights,
)

from keras_isaac import capture_inputs, kernel_status, release_inputs
from keras_isaac.selection import choice_of, is_chosen


def chosen(model, layers=None):
    """Which of these layers, or of the model's, are conditioned when the model trains."""
    return [choice_of(model)(layer) for layer in layers or model.layers]


def train(model):
    """One epoch under `ISAAC`."""
    model.compile(optimizer=paper_isaac(damping=0.1), loss="mse")
    fit(model, regression())
    return model


def test_returns_its_target():
    model = mlp()
    assert capture_inputs(model) is model
    assert capture_inputs(model.layers[0]) is model.layers[0]


def test_twice_is_once():
    twice = trained(paper_isaac(damping=0.1), lambda model: capture_inputs(capture_inputs(model)))
    assert_close(twice, trained(paper_isaac(damping=0.1), capture_inputs), 0)


def test_the_last_call_on_a_model_holds():
    model, inner, shared = nested()
    layers = inner.layers[0], shared, model.layers[-1]
    capture_inputs(capture_inputs(model), exclude=shared)
    assert chosen(model, layers) == [True, False, True]
    capture_inputs(model, include=shared)
    assert chosen(model, layers) == [False, True, False]
    # What is captured otherwise does not change the model's choice.
    capture_inputs(inner)
    capture_inputs(layers[-1])
    release_inputs(shared)
    train(model)
    assert chosen(model, layers) == [False, True, False]


def test_the_last_rules_hold_for_layers_that_are_built_later():
    model = capture_inputs(
        capture_inputs(keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3, name="head")])), ".*head"
    )
    # A question before there are paths settles nothing.
    assert chosen(model) == [False, False]
    model.build((None, 6))
    assert chosen(model) == [False, True]
    train(model)
    assert chosen(model) == [False, True]


def test_a_step_with_the_optimizer_of_a_released_model_raises():
    model = captured(paper_isaac(damping=0.1))
    fit(model, regression())
    release_inputs(model)
    variables = model.trainable_variables
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        model.optimizer.apply([keras.ops.zeros(variable.shape) for variable in variables], variables)


def test_a_released_model_trains_as_before():
    model = mlp()
    capture_inputs(model)
    model.compile(optimizer=SGD(0.1), loss="mse")
    fit(model, regression())
    assert release_inputs(model) is model
    assert chosen(model) == [False, False]
    release_inputs(model)
    fit(model, regression())
    reference = mlp()
    reference.compile(optimizer=SGD(0.1), loss="mse")
    fit(reference, regression(), epochs=2)
    assert_close(weights(model), weights(reference), 0)


EVENTS = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"]


@pytest.mark.often("on_train_begin", "on_train_batch_end")
@pytest.mark.parametrize("event", EVENTS)
def test_releasing_in_a_callback_trains_with_plain_gradients_from_then_on(event):
    """A damping of 1e8, which is set in its place in the reference, gives the plain gradient too."""

    def set_damping(model):
        if BACKEND == "jax":
            # During `fit`, the variables do not hold the current state.
            model.jax_state_sync()
        model.optimizer.damping = 1e8

    def run(change):
        model = captured(paper_isaac(damping=0.1))
        change_once = keras.callbacks.LambdaCallback(**{event: lambda *args, **kwargs: change(model)})
        fit(model, regression(), epochs=3, callbacks=[change_once])
        return model

    released = run(release_inputs)
    assert_close(weights(released), weights(run(set_damping)), 1e-4)
    before = weights(released)
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        fit(released, regression())
    assert_close(weights(released), before, 0)


def test_a_released_class_makes_plain_models():
    class Decorated(Branches):
        pass

    plain_init = Decorated.__init__
    assert release_inputs(capture_inputs(capture_inputs(Decorated))) is Decorated
    assert Decorated.__init__ is plain_init
    capture_inputs(capture_inputs(Decorated), exclude=".*main")
    model = Decorated()
    model.build((None, 6))
    assert chosen(model, [model.late, model.heads["main"]]) == [True, False]


@pytest.mark.parametrize("target", [None, "model", keras.layers.Dense, SGD])
@pytest.mark.parametrize("function", [capture_inputs, release_inputs])
def test_error_target_that_is_no_model_or_layer(function, target):
    with pytest.raises(TypeError, match=rf"Give `{function.__name__}` a `keras.Model`.* Received: target="):
        function(target)


@pytest.mark.parametrize("built", ["not", "by build", "by a call"])
@pytest.mark.parametrize("rule", [None, ".*head"])
@pytest.mark.filterwarnings("ignore:`build.*was called on layer:UserWarning")
def test_a_model_is_captured_as_keras_builds_it(built, rule):
    model = Subclassed()
    if built == "by build":
        model.build((None, 6))
    if built == "by a call":
        model(np.ones((2, 6), "float32"))
    capture_inputs(model, include=rule)
    train(model)
    assert chosen(model, model.body.layers) == [rule is None, True]


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.1, momentum=0.9), Adam], ids=["sgd", "adam"])
def test_captured_under_another_optimizer_trains_as_before(optimizer):
    assert_close(trained(optimizer(), capture_inputs), trained(optimizer()), 0)


@pytest.mark.often("before fit", "in a callback")
@pytest.mark.parametrize("when", ["before fit", "after fit", "in a callback"])
def test_capturing_holds_from_the_next_step(when):
    data = regression(16)
    model, reference = mlp(), capture_inputs(mlp())
    for each in (model, reference):
        each.compile(optimizer=SGD(0.1), loss="mse")
    if when == "before fit":
        capture_inputs(model)
    fit(reference, data, epochs=2)
    if when == "in a callback":
        start = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epoch or capture_inputs(model))
        fit(model, data, epochs=2, callbacks=[start])
    else:
        fit(model, data, epochs=2)
    capture_inputs(model)
    for each in (model, reference):
        each.compile(optimizer=paper_isaac(damping=0.1), loss="mse")
    fit(model, data, epochs=2)
    fit(reference, data, epochs=2)
    assert_close(weights(model), weights(reference), 0)


def test_capturing_more_layers_recompiles_the_step():
    data = regression(16)

    def run(more):
        model = mlp()
        capture_inputs(model, include=model.layers[0])
        model.compile(optimizer=paper_isaac(damping=0.1), loss="mse")
        fit(model, data)
        more(model)
        fit(model, data)
        return weights(model)

    only_first = run(lambda model: None)
    assert_differ(run(capture_inputs), only_first)
    assert_close(run(lambda model: capture_inputs(model.layers[1])), only_first, 0)


def test_choosing_again_and_releasing_touch_no_layer():
    model = capture_inputs(mlp())
    before = [dict(vars(layer)) for layer in model.layers]
    capture_inputs(model, include=".*head")
    capture_inputs(release_inputs(model))
    assert [dict(vars(layer)) for layer in model.layers] == before


def test_models_that_share_a_layer_choose_for_themselves():
    """A discriminator is conditioned in its own step, and left out of the combined model's."""
    layer = keras.layers.Dense(6, name="shared")
    alone = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3, name="top")])
    inputs = keras.Input((6,))
    combined = keras.Model(inputs, layer(keras.layers.Dense(6, name="bottom")(inputs)))
    capture_inputs(alone)
    capture_inputs(combined, exclude=layer)
    assert chosen(alone, [layer]) == [True]
    assert chosen(combined, [layer]) == [False]
    for model, is_conditioned in ((alone, True), (combined, False)):
        start, kernels = model.get_weights(), []
        for optimizer in (paper_isaac(0.1, 0.1), SGD(0.1)):
            model.compile(optimizer=optimizer, loss="mse")
            model.train_on_batch(np.ones((8, 6), "float32"), np.ones((8, model.output_shape[-1]), "float32"))
            kernels.append(to_numpy(layer.kernel))
            model.set_weights(start)
        if is_conditioned:
            assert_differ(kernels[:1], kernels[1:])
        else:
            assert_close(kernels[:1], kernels[1:])


def test_compiling_again_with_another_loss_renews_the_step():
    model, reference = captured(paper_isaac(damping=0.1)), mlp()
    fit(model, regression())
    reference.set_weights(model.get_weights())
    for each in (model, reference):
        captured(paper_isaac(damping=0.1), each, loss="mae")
        fit(each, regression())
    assert_close(weights(model), weights(reference), 0)


@pytest.mark.parametrize("captured", ["layer", "inner model"])
def test_error_of_a_model_of_which_a_layer_is_captured_alone(captured):
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    capture_inputs(inner if captured == "inner model" else inner.layers[0])
    model = keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        train(model)


def nested():
    inner = keras.Sequential([keras.layers.Dense(5, activation="tanh", name="first")], name="inner")
    shared = keras.layers.Dense(5, name="shared")
    inputs = keras.Input((6,))
    hidden = shared(shared(inner(inputs)))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden), name="outer"), inner, shared


def test_shared_layer_is_conditioned_call_by_call():
    layer = keras.layers.Dense(4, use_bias=False)
    inputs = [keras.Input((4,)), keras.Input((4,))]
    model = keras.Model(inputs, keras.layers.Add()([layer(x) for x in inputs]))
    kernel = to_numpy(layer.kernel)
    capture_inputs(model).compile(optimizer=paper_isaac(1.0, damping=0.1), loss="mse")
    random = np.random.default_rng(0)
    first, second, target = random.normal(size=(3, 6, 4)).astype("float32")
    gradient = 2 * ((first + second).astype("float64") @ kernel - target) / target.size
    model.train_on_batch([first, second], target)
    expected = sum(oracle.conditioned_gradient(rows, gradient, 0.1) for rows in (first, second))
    assert oracle.relative_error(kernel - to_numpy(layer.kernel), expected) < 1e-4


class Branches(keras.Model):
    """A subclassed model that keeps its layers in a list and a dictionary, and creates one as it is built."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.blocks = [keras.layers.Dense(units, activation="tanh", name="one"), keras.layers.Dense(units, name="two")]
        self.heads = {"main": keras.layers.Dense(3, name="main")}

    def build(self, input_shape):
        self.late = keras.layers.Dense(self.units, name="late")
        self.late.build((None, self.units))
        self.blocks[0].build(input_shape)
        self.blocks[1].build((None, self.units))
        self.heads["main"].build((None, self.units))

    def call(self, inputs):
        return self.heads["main"](self.late(self.blocks[1](self.blocks[0](inputs))))


def test_subclassed_model_with_later_built_layers():
    model = captured(paper_isaac(damping=0.1), Branches())
    fit(model, regression())
    assert all(chosen(model, [*model.blocks, model.late, model.heads["main"]]))


def test_sequential_grows_after_capturing():
    model = capture_inputs(keras.Sequential([keras.layers.Dense(4, activation="tanh")]))
    model.add(keras.layers.Dense(3))
    train(model)
    assert chosen(model) == [True, True]
    model.add(keras.layers.Dense(3))
    train(model)
    assert chosen(model) == [True, True, True]


@pytest.mark.parametrize("options", [None, {"exclude": ".*/main"}], ids=["plain", "with options"])
def test_class_decorator(options):
    class Decorated(Branches):
        pass

    plain_config = Decorated(units=4, name="branches").get_config()
    for _ in range(2):
        assert capture_inputs(Decorated, **(options or {})) is Decorated
    model = Decorated(units=4, name="branches")
    assert type(model) is Decorated
    assert model.get_config() == plain_config
    train(model)
    assert chosen(model, [model.blocks[0], model.heads["main"]]) == [True, options is None]
    assert not is_chosen(Branches().blocks[0])


@pytest.mark.parametrize(
    ("options", "captured"),
    [
        ({}, ["first", "shared", "head"]),
        ({"include": ".*head"}, ["head"]),
        ({"include": [".*head", ".*shared"]}, ["shared", "head"]),
        ({"exclude": ".*shared"}, ["first", "head"]),
        ({"include": ".*", "exclude": ".*head"}, ["first", "shared"]),
        ({"include": "inner"}, ["first"]),
        ({"exclude": ("inner", ".*head")}, ["shared"]),
    ],
    ids=str,
)
def test_include_and_exclude_by_path(options, captured):
    model, inner, shared = nested()
    capture_inputs(model, **options)
    layers = {"first": inner.layers[0], "shared": shared, "head": model.layers[-1]}
    assert [name for name, is_chosen in zip(layers, chosen(model, layers.values()), strict=True) if is_chosen] == captured


def test_include_and_exclude_by_layer():
    model, inner, shared = nested()
    capture_inputs(model, include=[inner, shared], exclude=shared)
    assert chosen(model, [inner.layers[0], shared, model.layers[-1]]) == [True, False, False]


def test_error_rules_that_match_nothing():
    model = mlp()
    with pytest.raises(
        ValueError,
        match=r"such as '.*hidden', '.*head'\. `include` matches no layer of Sequential.* Received: include='hiden'",
    ):
        capture_inputs(model, include="hiden")
    with pytest.raises(ValueError, match="`exclude` matches no layer"):
        capture_inputs(model, exclude="den")
    with pytest.raises(ValueError, match=r"`include` matches no layer of Sequential.* Received: include=Dense layer 'other'"):
        capture_inputs(model, include=keras.layers.Dense(3, name="other"))


def test_error_rules_that_match_nothing_in_a_model_built_later():
    model = capture_inputs(Branches(), include="nowhere")
    # Here an older `fit` quotes an error of the build.
    error = RuntimeError if BACKEND == "jax" and KERAS_VERSION < (3, 14) else ValueError
    with pytest.raises(error, match="`include` matches no layer of Branches"):
        train(model)


def test_error_layers_that_cannot_be_conditioned_when_named():
    class Mine(keras.layers.Dense):
        def call(self, inputs, training=None):
            return super().call(inputs) * 2

    with pytest.raises(
        ValueError, match=r"Register the layer by .*, or leave it out.* no conditioned form of BatchNormalization layer '.*'"
    ):
        capture_inputs(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match="no conditioned form of Mine layer"):
        capture_inputs(Mine(3))
    model = keras.Sequential([keras.Input((6,)), Mine(3, name="mine"), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"no conditioned form of Mine layer '.*mine'.* Received: include='\.\*mine'"):
        capture_inputs(model, include=".*mine")
    assert chosen(capture_inputs(model)) == [False, True]


def test_subclass_that_keeps_call_is_chosen():
    class Named(keras.layers.Dense):
        """Nothing of its own but a name."""

    assert is_chosen(capture_inputs(Named(3)))


@pytest.mark.often("isaac-{}-deepcopy", "isaac-{'include*-clone", "loss scale-{}-pickle")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("options", [{}, {"include": ".*head"}], ids=str)
@pytest.mark.parametrize("wrap", [lambda isaac: isaac, LossScaleOptimizer], ids=["isaac", "loss scale"])
def test_copies_are_captured_as_the_model_was(copied, options, wrap):
    model = capture_inputs(mlp(), **options)
    model.compile(optimizer=wrap(paper_isaac(damping=0.1)), loss="mse")
    model.optimizer.build(model.trainable_variables)
    other = COPIES[copied](model)
    assert chosen(other) == [not options, True]
    assert copied != "clone" or other.get_config() == model.get_config()
    fit(other, regression())


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_a_model_without_isaac_and_of_a_released_one_are_plain(copied):
    model = captured("sgd")
    assert chosen(COPIES[copied](model)) == [False, False]
    model.compile(optimizer=paper_isaac(), loss="mse")
    assert chosen(COPIES[copied](model)) == [True, True]
    assert chosen(COPIES[copied](release_inputs(model))) == [False, False]
    assert chosen(model) == [False, False]


def test_another_choice_for_a_copy():
    model = captured(paper_isaac(damping=0.1))
    other = capture_inputs(keras.models.clone_model(model), exclude=".*hidden")
    fit(other, regression())
    assert chosen(other) == [False, True]
    assert chosen(model) == [True, True]


def test_error_of_a_copy_that_is_plain():
    model = keras.models.clone_model(capture_inputs(mlp()))
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        train(model)


def test_error_of_a_model_in_which_nothing_can_be_conditioned_names_the_reasons():
    class Own(keras.layers.Dense):
        def call(self, inputs):
            return super().call(inputs)

    model = captured(paper_isaac(), keras.Sequential([keras.Input((6,)), Own(4), keras.layers.Dense(3, trainable=False)]))
    reasons = r"'.*own/kernel' \(no conditioned form of Own\), '.*/kernel' \(frozen\)"
    message = rf"Include, unfreeze or register .* `ISAAC` can condition nothing in '.*'. Kernels: {reasons}"
    with pytest.raises(ValueError, match=message):
        fit(model, regression())


def test_regularizers_and_constraints_work_as_before():
    kwargs = {"kernel_regularizer": "l2", "activity_regularizer": "l2", "kernel_constraint": "non_neg"}
    assert_only_damping_matters(lambda: mlp(**kwargs))


def test_integer_inputs_are_conditioned_as_floats():
    inputs, targets = regression()
    inputs = (inputs * 3).astype("int32")

    def after(dtype):
        model = with_random_weights(keras.Sequential([keras.Input((6,), dtype=dtype), keras.layers.Dense(3)]))
        fit(captured(paper_isaac(0.1, damping=0.1), model), (inputs.astype(dtype), targets))
        return weights(model)

    assert_close(after("int32"), after("float32"))


class Normalized(keras.layers.Dense):
    """Computes its kernel, as weight normalization does."""

    @property
    def kernel(self):
        return self._kernel / keras.ops.sqrt(keras.ops.sum(keras.ops.square(self._kernel), axis=0))


def test_a_kernel_that_is_computed_is_plain():
    def run(optimizer):
        model = keras.Sequential([keras.Input((6,)), Normalized(4, activation="relu"), keras.layers.Dense(3)])
        captured(optimizer, with_random_weights(model))
        assert [status.reason for status in kernel_status(model)] == ["the layer computes its kernel from it", None]
        fit(model, regression(), epochs=1, batch_size=100)
        return weights(model)

    plain, conditioned = run(SGD(0.1)), run(paper_isaac(0.1, damping=0.1))
    assert_close(conditioned[:1], plain[:1])
    assert_differ(conditioned[2:3], plain[2:3])
