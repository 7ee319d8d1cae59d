"""What training shows of the curvature: the `CurvatureMonitor` callback."""

import io
from typing import TYPE_CHECKING

import keras

from keras_isaac import backend
from keras_isaac.measurement import measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTITIES = {
    "effective_rank": "effective rank of the inputs",
    "damped_eigenvalue": "largest eigenvalue / damping",
    "norm_ratio": "conditioned / plain gradient",
    "cosine": "cosine between the two",
}
_NUMBERS = (*_QUANTITIES, "fallbacks")


class CurvatureMonitor(keras.callbacks.Callback):
    """Callback that measures, on a batch held aside, what conditioning does to every conditioned kernel.

    With X the input rows of a layer, of which the conditioner takes r, and M = XᵀX/r, five numbers a kernel:

    - `effective_rank`: tr(M)²/tr(M²), how many directions the inputs fill, from 1 to the number of features. It is R₀ of
      [Bartlett et al., 2020](https://arxiv.org/abs/1906.11300).
    - `damped_eigenvalue`: the largest eigenvalue of M over the damping λ (with `relative_damping`, over λ times the mean one).
      The gradient along that direction is divided by 1 plus this number: far below 1, conditioning does nothing.
    - `norm_ratio`: the norm of the conditioned gradient over that of the plain one.
    - `cosine`: the cosine of the angle between them.
    - `fallbacks`: how many of the kernel's inverses failed in float32 and gave way to a bound, which shortens the plain
      gradient. Anything but 0 is a sign of inputs that overflow.

    Of several groups or calls of a layer it is the mean rank and the largest eigenvalue. With an `output_damping`, both
    gradients are those that are conditioned on the outputs. The numbers are of the loss without what regularizers add.

    They stand in the `logs` of every epoch, the last ones measured, by the path of the kernel without the model's name and
    without `kernel`: `"dense/cosine"`. `History` has them there; put other callbacks that read logs, such as `CSVLogger` and
    `TensorBoard`, behind this one in the list. All measurements are in the attribute `history`: `"step"` and the same keys, a
    list each. Training is not altered: weights, statistics, seeds, metrics and the optimizer's state are those of a run
    without it.

    A measurement takes about two training steps on `data`, which may be smaller than a batch of training.

    Args:
        data: tuple `(x, y)` or `(x, y, sample_weight)`, one batch of arrays as for `train_on_batch`.
        every_steps: integer, measures before the first step and then every so many. Defaults to `100`.

    Raises:
        TypeError: if `data` is no such tuple.
        ValueError: if `every_steps` is no integer above 0 or, in training, if the model is not compiled with `ISAAC` or no
            kernel of it is conditioned.

    Example:
    >>> import keras
    >>> from keras_isaac import ISAAC, capture_inputs
    >>> from keras_isaac.callbacks import CurvatureMonitor
    >>> model = capture_inputs(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]))
    >>> model.compile(optimizer=ISAAC(), loss="mse")
    >>> x, y = keras.random.normal((64, 8)), keras.random.normal((64, 4))
    >>> monitor = CurvatureMonitor(data=(x[:16], y[:16]), every_steps=2)
    >>> history = model.fit(x, y, batch_size=16, callbacks=[monitor], verbose=0)
    >>> monitor.history["step"]
    [0, 2]
    """

    def __init__(self, data: tuple, every_steps: int = 100) -> None:
        super().__init__()
        if not isinstance(data, tuple) or len(data) not in (2, 3):
            raise TypeError(
                "`data` must be a tuple `(x, y)` or `(x, y, sample_weight)`, one batch. "
                f"Received: data of type {type(data).__name__}{f' and length {len(data)}' if isinstance(data, tuple) else ''}"
            )
        if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
            raise ValueError(f"`every_steps` must be an integer above 0. Received: every_steps={every_steps!r}")
        self.data = data
        self.every_steps = every_steps
        self.history: dict[str, list] = {}

    def on_train_begin(self, logs=None):
        """Starts a new history."""
        self.history = {"step": []}
        self._measure = None
        self._epoch_start = self._next_in_epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Counts the steps of the epochs before."""
        self._epoch_start = self._next_in_epoch

    # Keras runs what reads the end of a batch in step with training, on JAX too, which then waits for every step.
    def on_train_batch_begin(self, batch, logs=None):
        """Measures, if it is time."""
        step = self._epoch_start + batch
        self._next_in_epoch = step + self.model.steps_per_execution
        steps = self.history["step"]
        if steps and step < steps[-1] + self.every_steps:
            return
        if self._measure is None:
            self._measure = measurement(self.model, self.data)
        if backend.IS_STATELESS:
            # In `fit`, the state is not in the variables.
            self.model.jax_state_sync()
        steps.append(step)
        for path, values in self._measure().items():
            for quantity, value in zip(_NUMBERS, values, strict=True):
                self.history.setdefault(f"{self._short(path)}/{quantity}", []).append(float(value))

    def _short(self, path):
        # Progress bars show all of it.
        return path.removeprefix(f"{self.model.name}/").removesuffix("/kernel")

    def on_epoch_end(self, epoch, logs=None):
        """Adds the last measurement to the logs."""
        if logs is not None:
            logs.update({key: values[-1] for key, values in self.history.items() if key != "step"})

    def plot(self) -> "Figure":
        """Draws the quantities by step, a line a kernel; fallbacks, where there were any, are in the title.

        Returns:
            The Matplotlib figure.

        Raises:
            ImportError: if Matplotlib is not installed.
            ValueError: if nothing has been measured.
        """
        try:
            from matplotlib.figure import Figure as Base
        except ImportError as error:
            raise ImportError(
                "`plot` draws with Matplotlib, which is not installed. Write `pip install matplotlib`."
            ) from error
        if not self.history.get("step"):
            raise ValueError("There is nothing to plot before a `fit`: write `model.fit(..., callbacks=[monitor])` first.")

        class Figure(Base):
            def _repr_png_(self):
                # A notebook shows it, whether pyplot is set up there or not.
                picture = io.BytesIO()
                self.savefig(picture, format="png")
                return picture.getvalue()

        figure = Figure(figsize=(10, 6), constrained_layout=True)
        for axis, (quantity, label) in zip(figure.subplots(2, 2).flat, _QUANTITIES.items(), strict=True):
            for key, values in self.history.items():
                path, _, name = key.rpartition("/")
                if name == quantity:
                    axis.plot(self.history["step"], values, label=path)
            axis.set(title=label, xlabel="step", yscale="linear" if quantity == "cosine" else "log")
            axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        fallbacks = sum(sum(values) for key, values in self.history.items() if key.endswith("/fallbacks"))
        if fallbacks:
            figure.suptitle(f"{fallbacks:,.0f} inverses failed and gave way to a bound")
        return figure
