"""The `ISAAC` optimizer: the damping, the inner optimizer, and the check that the two halves of the pair have met."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_isaac import backend, scope
from keras_isaac.arguments import (
    LearningRateSchedule,
    build_inner_optimizer,
    check_flags,
    check_number,
    check_weight_sharing,
    public_config,
)
from keras_isaac.damping import Damping
from keras_isaac.optimizer_around import OptimizerAround
from keras_isaac.participation import Participation

# Functions of an `ISAAC`, called when it is made and when it is built: `capture.py` looks for its model then.
listeners: list[Callable[[Any], None]] = []


@keras.saving.register_keras_serializable(package="keras_isaac")
class ISAAC(OptimizerAround):
    """Optimizer whose gradients carry second-order information taken from the layers' inputs.

    It works in a pair with `keras_isaac.capture_inputs`: the captured layers of a model condition the gradients of their
    kernels in the backward pass, and `ISAAC` says with what damping and hands the result to an inner optimizer. With X the
    input rows of a layer `[rows, in]` and ∇ the gradient of its kernel `[in, out]`, the conditioned gradient is

    `ζ* = λ (λI + XᵀX/rows)⁻¹ ∇`

    where λ is the damping. The factor λ in front makes the inner optimizer's plain step the limit of a large damping. When
    the batch is smaller than the layer is wide, only a matrix of `[rows, rows]` is inverted, and the overhead vanishes.
    Clipping, weight decay, moving averages, gradient accumulation and `iterations` are the inner optimizer's, and so are
    its defaults: `ISAAC()` trains as AdamW does, on conditioned gradients. The paper's own method is
    `ISAAC(learning_rate=0.1, damping=1.0, inner_optimizer="sgd", relative_damping=False)`.

    References:
        - [ISAAC Newton: Input-based Approximate Curvature for Newton's Method](https://arxiv.org/abs/2305.00604), Petersen
          et al., ICLR 2023, with ζ* as λ_g tends to infinity and λ as λ_a.

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule` or callable, for the inner optimizer.
            Defaults to `None`: 0.1 for SGD, otherwise the inner optimizer's own default.
        damping: float > 0, or a `LearningRateSchedule` of the iteration. Much less than its unit trusts the curvature, much
            more approaches the plain gradient. The unit is each layer's own mean eigenvalue; with `relative_damping=False`,
            a squared input. Defaults to `1.0`.
        inner_optimizer: the Keras optimizer that takes the conditioned gradient: a name (`"sgd"`) or a class, built with
            `learning_rate` and `kwargs`; or an instance, and then neither of them may be given. Defaults to `"adamw"`.
        name: string. Defaults to `None`: chosen by Keras.
        relative_damping: boolean, whether the damping counts in units of each layer's own mean eigenvalue,
            `tr(XXᵀ) / (rows min(rows, in))`, so that the scale of the inputs does not matter. Defaults to `True`; `False`
            is the paper's form.
        preserve_norm: boolean, whether each layer's conditioned gradient is scaled to the norm of its plain gradient, so that
            a learning rate known to work with the inner optimizer carries over. Defaults to `False`.
        output_damping: float > 0, or `None` for ISAAC proper. Conditions the output side of each kernel too, with the
            empirical Fisher matrix: `ζ = ζ* μ (μI + rGᵀG)⁻¹` for μ this damping, λ_g in the paper, and G the gradient
            `[rows, out]` of a loss that is a mean over the r rows, with respect to the layer's product. In units of the squared
            gradients rG. Tables of embeddings, transposed convolutions, LoRA's factors and layers of `register_layer` have
            their input side conditioned alone. Defaults to `None`, the limit of a large one.
        weight_sharing: how the positions of a sequence or an image, which share one kernel, make rows: `"expand"`, each
            position is a row; `"reduce"`, a sample's mean over its positions is one. Defaults to `"expand"`. The terms are
            of [Eschenhagen et al., 2023](https://arxiv.org/abs/2311.00636).
        max_rows: integer, in a layer whose kernel is shared over positions, how many rows at most, spread evenly over
            samples and positions, stand for all of them; `None` for all. Defaults to `1024`.
        per_replica: boolean, whether each replica of a `keras.distribution` on JAX conditions its gradient on its own rows, as
            replicas do on TensorFlow and PyTorch in any case: no more crosses devices then than in a plain step. It holds for
            dense and einsum layers that see no mask, under `weight_sharing="expand"`; other layers are conditioned on the rows
            of the global batch. Defaults to `False`: all are.
        **kwargs: arguments of the inner optimizer, such as `clipnorm=1.0`. Those not given have its own defaults.

    Raises:
        ValueError: if a damping is not a finite number above 0, if `learning_rate` or `kwargs` come with an instance, if
            `weight_sharing` is none of the two, if `max_rows` is no integer above 0, or if a flag is no boolean.
        TypeError: if `inner_optimizer` is not an optimizer.

    Example:
    >>> import keras
    >>> from keras_isaac import ISAAC, capture_inputs
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = capture_inputs(model)
    >>> model.compile(optimizer=ISAAC(learning_rate=3e-3, damping=0.3, clipnorm=1.0), loss="mse")
    >>> history = model.fit(keras.random.normal((32, 8)), keras.random.normal((32, 4)), verbose=0)
    """

    def __init__(
        self,
        learning_rate: float | LearningRateSchedule | Callable[[], Any] | None = None,
        damping: float | LearningRateSchedule = 1.0,
        inner_optimizer: str | keras.optimizers.Optimizer | type[keras.optimizers.Optimizer] = "adamw",
        name: str | None = None,
        *,
        relative_damping: bool = True,
        preserve_norm: bool = False,
        output_damping: float | None = None,
        weight_sharing: Literal["expand", "reduce"] = "expand",
        max_rows: int | None = 1024,
        per_replica: bool = False,
        **kwargs: Any,
    ) -> None:
        if output_damping is not None:
            check_number("output_damping", output_damping, "a finite number above 0 or `None`")
        check_weight_sharing(weight_sharing, max_rows)
        check_flags(relative_damping=relative_damping, preserve_norm=preserve_norm, per_replica=per_replica)
        super().__init__(build_inner_optimizer(inner_optimizer, learning_rate, kwargs), name)
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer) or isaacs_in(self.inner_optimizer):
            raise ValueError(
                f"`{type(self.inner_optimizer).__name__}` cannot stand inside `ISAAC`. Put it around it: "
                f"`keras.optimizers.LossScaleOptimizer(ISAAC(...))`. Received: inner_optimizer={inner_optimizer!r}"
            )
        self.relative_damping = relative_damping
        self.preserve_norm = preserve_norm
        self.output_damping = None if output_damping is None else float(output_damping)
        self.weight_sharing = weight_sharing
        self.max_rows = max_rows
        self.per_replica = per_replica
        # Which layers of a copied model are to be captured: `True` for all, or their paths; `None` if that is not known.
        self.captured = None
        self.participation = Participation()
        self._trained_variables = None
        self._damping = Damping(damping, self.name)
        for listener in listeners:
            listener(self)

    @property
    def damping(self) -> Any:
        """The damping λ: a variable, or the schedule's value at the present iteration."""
        return self._damping.at(self.iterations)

    @damping.setter
    def damping(self, damping: float) -> None:
        self._damping.assign(damping)

    @contextlib.contextmanager
    def conditioning(self, optimizer_variables: Sequence[Any] | None = None) -> Iterator[None]:
        """Conditions the gradients of captured layers inside the `with` block, for a training loop of your own.

        `fit` and `train_on_batch` of a captured model do this by themselves. The forward pass belongs inside the block.

        Args:
            optimizer_variables: on the JAX backend, where state is explicit, the list of tensors that stands for
                `optimizer.variables` in this step. Not used on other backends. Defaults to `None`.

        Raises:
            ValueError: on the JAX backend, if `optimizer_variables` is missing or of another length.

        Example:
        >>> import keras
        >>> from keras_isaac import ISAAC, capture_inputs
        >>> optimizer = ISAAC(inner_optimizer="adam")
        >>> layer = capture_inputs(keras.layers.Dense(1))
        >>> layer.build((None, 3))
        >>> optimizer.build(layer.trainable_variables)
        >>> with optimizer.conditioning([v.value for v in optimizer.variables]):
        ...     loss = keras.ops.mean(layer(keras.ops.ones((2, 3))))
        """
        mapping = []
        if backend.IS_STATELESS:
            received = "None" if optimizer_variables is None else f"a list of length {len(optimizer_variables)}"
            if optimizer_variables is None or len(optimizer_variables) != len(self.variables):
                raise ValueError(
                    "On the JAX backend `conditioning()` takes the values of the optimizer's variables, so that a change of "
                    "the damping reaches a compiled step. Write `with optimizer.conditioning(optimizer_variables):` with the "
                    f"same list of {len(self.variables)} tensors that goes to `stateless_apply`. "
                    f"Received: optimizer_variables={received}"
                )
            mapping = list(zip(self.variables, optimizer_variables, strict=True))
        with scope.open_scope(self.conditioning_of_step(mapping)):
            yield

    def conditioning_of_step(self, state_mapping=(), outer_optimizer=None):
        """Returns this step's `Conditioning`.

        Args:
            state_mapping: list of pairs of variable and tensor, under which the state is read.
            outer_optimizer: the optimizer that scales the loss. Defaults to `None`: this one.
        """
        stateless = keras.StatelessScope(state_mapping) if state_mapping else contextlib.nullcontext()
        output_damping = None
        with stateless:
            # Read once: on TensorFlow a variable stays one, and layers that share their input would not share its inverse.
            damping = ops.stop_gradient(ops.convert_to_tensor(self.damping))
            if self.output_damping is not None:
                output_damping = ops.convert_to_tensor(self.output_damping, "float32")
                if not self.relative_damping:
                    # The output's gradients come multiplied by the scale of the loss.
                    scale = ops.cast((outer_optimizer or self).scale_loss(ops.ones((), "float32")), "float32")
                    output_damping = output_damping * scale * scale
        return scope.Conditioning(
            damping=damping,
            output_damping=output_damping,
            relative_damping=self.relative_damping,
            preserve_norm=self.preserve_norm,
            weight_sharing=self.weight_sharing,
            max_rows=self.max_rows,
            per_replica=self.per_replica,
            trains=self._trains,
            on_use=self.participation.note,
        )

    def _trains(self, variable):
        return variable.trainable and (self._trained_variables is None or id(variable) in self._trained_variables)

    def forget(self):
        """Says that its model is captured no more."""
        self.captured = None
        self.participation.forget()

    def build(self, variables):
        """Builds the inner optimizer for `variables`."""
        if not variables:
            # Keras builds the optimizer of a `.h5` file for no variables, and for all of them once it trains.
            return
        self.inner_optimizer.build(variables)
        super().build(variables)
        self._trained_variables = frozenset(id(v) for v in variables)
        for listener in listeners:
            listener(self)

    def apply(self, grads, trainable_variables=None):
        """Applies conditioned gradients by the inner optimizer.

        Raises:
            ValueError: if no captured layer has conditioned a gradient for this optimizer in this step.
        """
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        self.participation.check(trainable_variables or self._trainable_variables)
        if not self.built:
            with keras.name_scope(self.name):
                self.build(trainable_variables)
        self.inner_optimizer.apply(backend.barrier(grads), trainable_variables)

    @property
    def variables(self):
        """The damping, if it is a variable, and the inner optimizer's variables."""
        # During `super().__init__` there is no inner optimizer yet.
        own = self._damping.variables if hasattr(self, "_damping") else []
        return own + self.inner_optimizer.variables

    def save_own_variables(self, store):
        """Saves the damping; Keras saves the inner optimizer by itself."""
        self._damping.save(store)

    def load_own_variables(self, store):
        """Loads the damping; Keras loads the inner optimizer by itself."""
        self._damping.load(store)

    def get_config(self):
        """Returns the configuration: the arguments, and the serialized inner optimizer."""
        inner_optimizer = public_config(self.inner_optimizer)
        return {
            "name": self.name,
            # Loggers look for it here.
            "learning_rate": inner_optimizer["config"].get("learning_rate"),
            "damping": self._damping.get_config(),
            "inner_optimizer": inner_optimizer,
            "relative_damping": self.relative_damping,
            "preserve_norm": self.preserve_norm,
            "output_damping": self.output_damping,
            "weight_sharing": self.weight_sharing,
            "max_rows": self.max_rows,
            "per_replica": self.per_replica,
            "captured": sorted(self.captured) if isinstance(self.captured, frozenset) else self.captured,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Builds the optimizer from its configuration."""
        config = dict(config)
        captured = config.pop("captured", None)
        if isinstance(config.get("inner_optimizer"), dict):
            inner_optimizer = dict(config["inner_optimizer"])
            learning_rate = config.pop("learning_rate", None)
            if learning_rate is not None:
                inner_optimizer["config"] = {**inner_optimizer["config"], "learning_rate": learning_rate}
            config["inner_optimizer"] = inner_optimizer
        for key in ("damping", "inner_optimizer"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        optimizer = cls(**config)
        optimizer.captured = captured if captured is None or captured is True else frozenset(captured)
        return optimizer


def isaacs_in(optimizer):
    """Returns the `ISAAC` optimizers in `optimizer`: itself, in a LossScaleOptimizer or in a MultiOptimizer."""
    if isinstance(optimizer, ISAAC):
        return [optimizer]
    inner = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    return [isaac for each in inner if each is not None for isaac in isaacs_in(each)]


# Keras looks up the optimizer of `model.compile(optimizer="isaac")` here.
keras.saving.get_custom_objects()["isaac"] = ISAAC
