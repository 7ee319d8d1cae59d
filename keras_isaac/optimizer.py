"""The `ISAAC` optimizer: the damping and the other options of conditioning, and the inner optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_isaac import backend, scope
from keras_isaac.arguments import build_inner_optimizer, check_damping, check_options
from keras_isaac.optimizer_wrapper import OptimizerWrapper
from keras_isaac.selection import is_chosen
from keras_isaac.training import StepCheck, capture_copy


@keras.saving.register_keras_serializable(package="keras_isaac")
class ISAAC(OptimizerWrapper):
    """Optimizer whose gradients carry second-order information taken from the layers' inputs.

    It works in a pair with `keras_isaac.capture_inputs`: the captured layers of a model condition the gradients of their
    kernels in the backward pass, and `ISAAC` says with what damping and hands the result to an inner optimizer. With X the
    input rows of a layer `[rows, in]` and ∇ the gradient of its kernel `[in, out]`, the conditioned gradient is

    `ζ* = λ (λI + XᵀX/rows)⁻¹ ∇`

    where λ is the damping. The factor λ in front makes the inner optimizer's plain step the limit of a large damping. When
    the batch is smaller than the layer is wide, only a matrix of `[rows, rows]` is inverted, and the overhead vanishes.
    Clipping, weight decay, moving averages, gradient accumulation and `iterations` are the inner optimizer's, and so are
    its defaults: `ISAAC()` trains as AdamW does, on conditioned gradients. The paper's own method is
    `ISAAC(learning_rate=0.1, inner_optimizer="sgd", relative_damping=False, max_rows=1024)`.

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
            gradients rG. Only `Dense` and `EinsumDense` layers without a mask have it; leave others out by `exclude`.
            Defaults to `None`, the limit of a large one.
        weight_sharing: how the positions of a sequence or an image, which share one kernel, make rows: `"expand"`, each
            position is a row; `"reduce"`, a sample's mean over its positions is one. Defaults to `"expand"`. The terms are
            of [Eschenhagen et al., 2023](https://arxiv.org/abs/2311.00636).
        max_rows: integer, the most rows that condition a kernel which positions share: of more positions, sums under random
            signs are formed. It changes the cost, not the unit of the damping. Defaults to `None`, a budget: as many as add at
            most 10 % to the layer's own multiplications, and at least 64. Other kernels, such as those of `Dense` on a batch
            of vectors, are conditioned on all samples. Without `max_rows`, and where the batch size is known while the step is
            traced (not in `fit` on TensorFlow), a narrow one whose multiplications this would more than double is conditioned
            on as many sums as double them, and at least 8.
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
        max_rows: int | None = None,
        per_replica: bool = False,
        **kwargs: Any,
    ) -> None:
        check_damping(damping)
        flags = {"relative_damping": relative_damping, "preserve_norm": preserve_norm, "per_replica": per_replica}
        check_options(output_damping, weight_sharing, max_rows, **flags)
        inner_optimizer = build_inner_optimizer(inner_optimizer, learning_rate, kwargs)
        super().__init__(inner_optimizer, name)
        self.relative_damping = relative_damping
        self.preserve_norm = preserve_norm
        self.output_damping = None if output_damping is None else float(output_damping)
        self.weight_sharing = weight_sharing
        self.max_rows = max_rows
        self.per_replica = per_replica
        # Which layers of a copied model are to be captured: `True` for all, or their paths; `None` if that is not known.
        self.captured: bool | frozenset[str] | None = None
        self.step_check = StepCheck()
        self._damping: Any = damping
        if not isinstance(damping, LearningRateSchedule):
            with keras.name_scope(self.name):
                self._damping = keras.Variable(
                    float(damping),
                    dtype=keras.backend.floatx(),
                    trainable=False,
                    # Layers read it, and would round it to their compute dtype: 1e-8 is 0 in float16.
                    autocast=False,
                    aggregation="only_first_replica",
                    name="damping",
                )

    @property
    def damping(self) -> Any:
        """The damping λ: a variable, or the schedule's value at the present iteration."""
        return self._damping(self.iterations) if isinstance(self._damping, LearningRateSchedule) else self._damping

    @damping.setter
    def damping(self, damping: float) -> None:
        check_damping(damping)
        if isinstance(self._damping, LearningRateSchedule) or isinstance(damping, LearningRateSchedule):
            raise TypeError(
                "Compile the model with a new `ISAAC(damping=...)`: a damping can be set only from a number to a number, "
                f"because a schedule is part of the compiled training step. Received: damping={damping}"
            )
        self._damping.assign(damping)

    @contextlib.contextmanager
    def conditioning(self, optimizer_variables: Sequence[Any] | None = None) -> Iterator[None]:
        """Conditions the gradients of captured layers inside the `with` block, for a training loop of your own.

        `fit` and `train_on_batch` of a captured model do this by themselves. Run the forward pass inside the block. It
        conditions the layers that were captured alone, and those that any captured model chooses.

        Args:
            optimizer_variables: on the JAX backend, where state is explicit, the list of tensors that
                `optimizer.variables` have in this step. Not used on other backends. Defaults to `None`.

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
                    "Write `with optimizer.conditioning(optimizer_variables):` with the same list of "
                    f"{len(self.variables)} tensors that goes to `stateless_apply`. On JAX the damping is read from it. "
                    f"Received: optimizer_variables={received}"
                )
            mapping = list(zip(self.variables, optimizer_variables, strict=True))
        with scope.open_scope(self.conditioning_of_step(mapping)):
            yield
        scope.closed.add(self.step_check)

    def conditioning_of_step(
        self,
        state_mapping: Sequence[tuple] = (),
        outer_optimizer: keras.optimizers.Optimizer | None = None,
        chooses: Callable[[keras.Layer], bool] = is_chosen,
    ) -> scope.Conditioning:
        """Returns this step's `Conditioning`.

        Args:
            state_mapping: list of pairs of variable and tensor, the values of the optimizer's variables in this step.
            outer_optimizer: the optimizer that scales the loss. Defaults to `None`: this one.
            chooses: function that returns whether a layer is conditioned. Defaults to that of custom training loops.
        """
        stateless = keras.StatelessScope(state_mapping) if state_mapping else contextlib.nullcontext()
        output_damping = None
        with stateless:
            # Read once: on TensorFlow a variable stays one, and layers that share their input would not share its inverse.
            damping = ops.stop_gradient(ops.convert_to_tensor(self.damping))
            if self.output_damping is not None:
                output_damping = ops.convert_to_tensor(self.output_damping, "float32")
                if not self.relative_damping:
                    # The output's gradients are multiplied by the scale of the loss.
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
            chooses=chooses,
            on_use=self.step_check.note_use,
        )

    def _trains(self, variable: keras.Variable) -> bool:
        trained = self.step_check.trained
        return variable.trainable and (not trained or id(variable) in trained)

    def build(self, variables: list[keras.Variable]) -> None:
        """Builds the inner optimizer for `variables`."""
        if not variables:
            # Keras builds the optimizer of a `.h5` file for no variables, and for all of them once it trains.
            return
        self.inner_optimizer.build(variables)
        super().build(variables)
        self.step_check.trained = {id(variable): variable for variable in variables}
        capture_copy(self)

    def apply(self, grads: Sequence, trainable_variables: Sequence | None = None) -> None:
        """Applies conditioned gradients by the inner optimizer.

        Raises:
            ValueError: if no captured layer has conditioned a gradient for this optimizer in this step.
        """
        if len(grads) == 0:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        self.step_check.check(trainable_variables)
        if trainable_variables is not None and not self.built:
            with keras.name_scope(self.name):
                self.build(trainable_variables)
        self.inner_optimizer.apply(backend.barrier(grads), trainable_variables)

    def stateless_apply(self, optimizer_variables: Sequence, grads: Sequence, trainable_variables: Sequence) -> tuple:
        """Returns the new values of the trainable variables and of `optimizer.variables`, on JAX."""
        if len(trainable_variables) == 0:
            # An optimizer that has nothing to train is not built.
            return list(trainable_variables), [ops.convert_to_tensor(value) for value in optimizer_variables]
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    @property
    def variables(self) -> list[keras.Variable]:
        """The damping, if it is a variable, and the inner optimizer's variables."""
        # During `super().__init__` there is no damping yet.
        damping = getattr(self, "_damping", None)
        return [*([damping] if isinstance(damping, keras.Variable) else []), *self.inner_optimizer.variables]

    def scale_loss(self, loss: Any) -> Any:
        """Scales the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def save_own_variables(self, store: Any) -> None:
        """Saves the damping; Keras saves the inner optimizer by itself."""
        if isinstance(self._damping, keras.Variable):
            store["damping"] = self._damping.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Loads the damping, if it was saved; Keras loads the inner optimizer by itself."""
        if isinstance(self._damping, keras.Variable) and "damping" in store.keys():  # noqa: SIM118 (a store of HDF5)
            self._damping.assign(store["damping"])

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration: the arguments, and the serialized inner optimizer."""
        inner_optimizer = keras.saving.serialize_keras_object(self.inner_optimizer)
        inner_class = type(self.inner_optimizer)
        public_class = getattr(keras.optimizers, inner_class.__name__, None)
        if inner_class.__module__.startswith("keras.") and public_class in inner_class.__mro__[1:]:
            # A subclass for one backend.
            inner_optimizer = {**inner_optimizer, "module": "keras.optimizers", "registered_name": None}
        if isinstance(self._damping, LearningRateSchedule):
            damping: Any = keras.optimizers.schedules.serialize(self._damping)
        else:
            damping = float(ops.convert_to_numpy(self._damping))
        return {
            "name": self.name,
            # Loggers look for it here.
            "learning_rate": inner_optimizer["config"].get("learning_rate"),
            "damping": damping,
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
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> "ISAAC":
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


# Keras looks up the optimizer of `model.compile(optimizer="isaac")` here.
keras.saving.get_custom_objects()["isaac"] = ISAAC
