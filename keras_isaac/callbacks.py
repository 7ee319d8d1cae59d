"""The `CurvatureMonitor` callback, which measures during training what conditioning does."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from keras_isaac import backend
from keras_isaac.measurement import build_measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTITIES = {
    "effective_rank": "effective rank of the inputs",
    "damped_eigenvalue": "largest eigenvalue / damping",
    "norm_ratio": "norm / plain gradient's norm",
    "cosine": "cosine to the plain gradient",
}
_NUMBERS = (*_QUANTITIES, "fallbacks")
# Values of `damped_eigenvalue` below and above which `plot` calls the damping too high and too low.
TOO_HIGH, TOO_LOW = 0.1, 1000.0


class CurvatureMonitor(keras.callbacks.Callback):
    """Callback that measures on one batch what conditioning does to the gradient of every conditioned kernel.

    With X the input rows of a layer, of which the conditioner uses r, and M = XᵀX/r, it measures for every kernel:

    - `effective_rank`: tr(M)²/tr(M²), from 1 to the number of features: how many directions the inputs fill. It is R₀ of
      [Bartlett et al., 2020](https://arxiv.org/abs/1906.11300).
    - `damped_eigenvalue`: the largest eigenvalue of M divided by the damping λ (with `relative_damping`, by λ times the mean
      eigenvalue). The gradient along that eigenvector is divided by 1 plus this number.
    - `norm_ratio`: the norm of the conditioned gradient divided by that of the plain one.
    - `cosine`: the cosine of the angle between the two.
    - `fallbacks`: how many inverses of the kernel failed in float32, so that a bound replaced them, which shortens the plain
      gradient. Any number but 0 is a sign of inputs that overflow.

    For a kernel of several groups or calls, it is the mean rank and the largest eigenvalue. With `output_damping`, both
    gradients are conditioned on the outputs. The loss is without regularizers.

    `plot` shades two ranges of `damped_eigenvalue`. Below 0.1 the damping is too high: the conditioned gradient differs from
    the plain one by less than 10 % of its norm. Above 1,000 the damping is too low: for a classifier, a convolutional network
    and an autoencoder of images of digits, the test loss was lowest between 10 and 1,000 (a `damping` of 0.1 to 1), 3 to 10 %
    higher near 4,000 (0.01), and 8 to 30 % higher near 40,000 (0.001).

    The attribute `history` is a dictionary of lists: `"step"`, and a key such as `"dense/cosine"` for every kernel and quantity
    (the kernel's path without the model's name and without `kernel`). Training does not change: weights, statistics, seeds,
    metrics and the optimizer's state are those of a run without the callback.

    A measurement takes about as long as two training steps on `data`, which may be smaller than a training batch.

    Args:
        data: tuple `(x, y)` or `(x, y, sample_weight)`, one batch of arrays as for `train_on_batch`.
        every_steps: integer, measures before the first step and then every so many steps. Defaults to `100`.
        log: boolean, whether the last measurement is added to the `logs` of every epoch, where `History`, `CSVLogger` and
            `TensorBoard` read it if they come after this callback in the list. A progress bar then prints five numbers for
            every kernel. Defaults to `False`.

    Raises:
        TypeError: if `data` is not such a tuple of arrays.
        ValueError: if `every_steps` is not an integer above 0 or `log` not a boolean; in training, if the model is not compiled
            with `ISAAC` or none of its kernels is conditioned.

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

    def __init__(self, data: tuple, every_steps: int = 100, log: bool = False) -> None:
        super().__init__()
        if not isinstance(data, tuple) or len(data) not in (2, 3):
            raise TypeError(
                "`data` must be a tuple `(x, y)` or `(x, y, sample_weight)`, one batch. "
                f"Received: data of type {type(data).__name__}{f' and length {len(data)}' if isinstance(data, tuple) else ''}"
            )
        for leaf in keras.tree.flatten(data):
            if not hasattr(leaf, "shape"):
                raise TypeError(
                    "`data` must contain arrays: write `numpy.asarray(x)` for a list. "
                    f"Received: data that contain {leaf!r:.50} (of type {type(leaf).__name__})"
                )
        if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
            raise ValueError(f"`every_steps` must be an integer above 0. Received: every_steps={every_steps!r}")
        if not isinstance(log, bool):
            raise ValueError(f"`log` must be a boolean. Received: log={log!r}")
        self.data = data
        self.every_steps = every_steps
        self.log = log
        self.history: dict[str, list] = {}
        self._measure: Callable[[], dict[str, Any]] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts a new history."""
        self.history = {"step": []}
        self._measure = None
        self._next_step = 0

    # Not at the end of a batch: a callback that is called there makes JAX wait for every step.
    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures every `every_steps` steps."""
        step, steps = self._next_step, self.history["step"]
        self._next_step += self.model.steps_per_execution
        if steps and step < steps[-1] + self.every_steps:
            return
        if self._measure is None:
            self._measure = build_measure(self.model, self.data)
        if backend.IS_STATELESS:
            # During `fit`, the variables do not hold the current state.
            self.model.jax_state_sync()
        steps.append(step)
        for path, values in self._measure().items():
            name = path.removeprefix(f"{self.model.name}/").removesuffix("/kernel")
            for quantity, value in zip(_NUMBERS, values, strict=True):
                self.history.setdefault(f"{name}/{quantity}", []).append(float(value))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the last measurement to the logs, if `log`."""
        if self.log and logs is not None:
            logs.update({key: values[-1] for key, values in self.history.items() if key != "step"})

    def plot(self) -> "Figure":
        """Plots the quantities by step, one line for each kernel, and where the damping is too high or too low.

        The title counts fallbacks, if there are any.

        Returns:
            Matplotlib figure.

        Raises:
            ImportError: if Matplotlib is not installed.
            ValueError: if nothing has been measured.
        """
        try:
            from matplotlib.figure import Figure as Base
        except ImportError as error:
            raise ImportError("Write `pip install matplotlib`: `plot` needs Matplotlib, which is not installed.") from error
        if not self.history.get("step"):
            raise ValueError("Write `model.fit(..., callbacks=[monitor])` first: there is nothing to plot before a `fit`.")

        class Figure(Base):
            def _repr_png_(self) -> bytes:
                # A notebook shows the figure, even where pyplot is not set up.
                picture = io.BytesIO()
                self.savefig(picture, format="png")
                return picture.getvalue()

        figure = Figure(figsize=(10, 6), constrained_layout=True)
        for axis, (quantity, label) in zip(figure.subplots(2, 2).flat, _QUANTITIES.items(), strict=True):
            for key, values in self.history.items():
                path, _, name = key.rpartition("/")
                if name == quantity:
                    axis.plot(self.history["step"], values, label=path)
            axis.set(xlabel="step", ylabel=label, yscale="linear" if quantity == "cosine" else "log")
            axis.grid(alpha=0.3)
            if quantity == "damped_eigenvalue":
                _shade(axis)
        axis.legend(fontsize="small", title="kernel of")
        fallbacks = sum(sum(values) for key, values in self.history.items() if key.endswith("/fallbacks"))
        if fallbacks:
            figure.suptitle(f"{fallbacks:,.0f} inverses failed, and a bound replaced them")
        return figure


def _shade(axis: "Axes") -> None:
    """Shades and names the ranges in which the damping is too high and too low."""
    bottom, top = axis.get_ylim()
    bottom, top = min(bottom, TOO_HIGH / 3), max(top, TOO_LOW * 3)
    axis.set_ylim(bottom, top)
    for low, high, text in ((bottom, TOO_HIGH, "damping too high"), (TOO_LOW, top, "damping too low")):
        axis.axhspan(low, high, color="tab:red", alpha=0.12, linewidth=0)
        middle = (low * high) ** 0.5
        axis.text(0.02, middle, text, transform=axis.get_yaxis_transform(), verticalalignment="center", fontsize="small")
