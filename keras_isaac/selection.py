"""Which layers are conditioned: the walk through a model, the rules of `include` and `exclude`, and the choice in force."""

import difflib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeAlias

import keras

from keras_isaac import keras_hooks
from keras_isaac.layers import adapter_of

# A layer, or a regular expression of its path.
Rule: TypeAlias = str | keras.Layer
# The layers that contain a layer, outermost first.
Containers: TypeAlias = tuple[keras.Layer, ...]
# The layers that were captured alone, for training loops.
captured_alone: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
# The `CapturedModel`s of the models that captured each layer. They live as long as the models do.
captured_by: weakref.WeakKeyDictionary[keras.Layer, weakref.WeakSet] = weakref.WeakKeyDictionary()


def walk(root: keras.Layer, containers: Containers = ()) -> Iterator[tuple[keras.Layer, Containers]]:
    """Yields `root` and every layer in it, each with the layers that contain it, outermost first."""
    seen = {id(root)}
    stack = [(root, containers)]
    while stack:
        layer, containers = stack.pop()
        yield layer, containers
        values = list(vars(layer).values())
        while values:
            value = values.pop()
            if isinstance(value, (list, tuple, set, dict)):
                if id(value) not in seen:
                    seen.add(id(value))
                    values.extend(value.values() if isinstance(value, dict) else value)
            elif isinstance(value, keras.Layer) and id(value) not in seen:
                seen.add(id(value))
                stack.append((value, (*containers, layer)))


def check_rules(name: str, rules: Rule | Sequence[Rule] | None) -> tuple[Rule, ...] | None:
    """Returns the rules of the argument `name` as a tuple, or `None`; raises if one is no rule."""
    if rules is None:
        return None
    rules = tuple(rules) if isinstance(rules, (list, tuple, set)) else (rules,)
    for rule in rules:
        if not isinstance(rule, (str, keras.Layer)):
            raise TypeError(
                f"`{name}` takes layers and regular expressions of layer paths, or a list of them. "
                f"Received: {name}={rule!r} (of type {type(rule).__name__})"
            )
        if isinstance(rule, str):
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(
                    f"`{name}` takes regular expressions, in which `.*` and not `*` matches any characters. "
                    f"Received: {name}={rule!r} ({error})"
                ) from error
    return rules


def matches(rules: Sequence[Rule], layer: keras.Layer, containers: Containers) -> bool:
    """Returns whether one of the rules names `layer` or a layer that contains it."""
    return any(_names(rule, each) for rule in rules for each in (layer, *containers))


def _names(rule: Rule, layer: keras.Layer) -> bool:
    if isinstance(rule, str):
        return layer.path is not None and re.fullmatch(rule, layer.path) is not None
    return rule is layer


def check_matches(model: keras.Model, include: tuple[Rule, ...] | None, exclude: tuple[Rule, ...] | None) -> None:
    """Raises if a rule matches no layer of a model that is built, or a rule of `include` none that can be conditioned."""
    layers = list(walk(model))
    if not all(layer.built for layer, _ in layers):
        return
    for name, rules in (("include", include), ("exclude", exclude)):
        for rule in rules or ():
            named = [layer for layer, containers in layers if matches((rule,), layer, containers)]
            if not named:
                hint = ""
                if isinstance(rule, str):
                    paths = [layer.path for layer, _ in layers if adapter_of(layer)]
                    nearest = difflib.get_close_matches(rule, paths, n=2, cutoff=0)
                    hint = f"A regular expression must match a whole `layer.path`, such as {', '.join(map(repr, nearest))}. "
                raise ValueError(f"{hint}`{name}` matches no layer of {describe(model)}. Received: {name}={describe(rule)}")
            if name == "include" and not any(adapter_of(layer) for layer in named):
                raise_unsupported(sorted({describe(layer) for layer in named}), f"include={describe(rule)}")


def is_chosen(layer: keras.Layer) -> bool:
    """Returns whether this layer is conditioned in a custom training loop: captured alone, or chosen by a living model."""
    return layer in captured_alone or any(model.chooses(layer) for model in captured_by.get(layer, ()))


def choice_of(model: keras.Layer) -> Callable[[keras.Layer], bool]:
    """Returns the function that says which layers are conditioned when this model, or layer, trains."""
    owner = keras_hooks.owner_of(model)
    return is_chosen if owner is None or not owner.is_captured else owner.chooses


def describe(layer: Rule) -> str:
    """Returns how messages name a layer or a rule."""
    if isinstance(layer, str):
        return repr(layer)
    return f"{type(layer).__name__} layer '{layer.path or layer.name}'"


def shorten(names: Sequence[str], num: int = 3) -> str:
    """Returns the first names of a list, as messages show them."""
    return ", ".join(names[:num]) + (f", ... ({len(names)} in all)" if len(names) > num else "")


def raise_unsupported(layers: list[str], received: str) -> NoReturn:
    """Raises, because none of these layers can be conditioned."""
    raise ValueError(
        "Register the layer by `keras_isaac.register_layer`, or leave it out: then it trains with its plain gradient. There is "
        f"no conditioned form of {shorten(layers)}. Received: {received}"
    )
