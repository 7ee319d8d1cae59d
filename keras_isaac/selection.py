"""Which layers of a model are meant: the walk through all of them, and the rules of `include` and `exclude`."""

import difflib
import re
import weakref
from typing import TypeAlias

import keras

from keras_isaac.layers import adapter_of, supported_kinds

# A layer, or a regular expression of its path.
Rule: TypeAlias = str | keras.Layer


def walk(root, containers=()):
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


class Selection:
    """The rules of one call, and what came of them so far."""

    def __init__(self, include, exclude):
        self.include, self.exclude = check_rules("include", include), check_rules("exclude", exclude)
        self.waiting = weakref.WeakSet()
        self._by_path = any(isinstance(rule, str) for rule in (*(self.include or ()), *(self.exclude or ())))
        self._decided, self._matched, self._chosen = weakref.WeakSet(), set(), set()

    def chooses(self, layer, containers):
        """Whether `layer` is to be captured; it is asked once a layer, so that a later choice for that layer holds."""
        # A layer has no path before it is built, so that it is too early to tell.
        if layer in self._decided or (self._by_path and layer.path is None):
            return False
        self._decided.add(layer)
        included, excluded = _matching(self.include, layer, containers), _matching(self.exclude, layer, containers)
        self._matched |= included | excluded
        if adapter_of(layer):
            self._chosen |= included
        return (self.include is None or bool(included)) and not excluded

    def check(self, model):
        """Raises if a rule matched nothing, or nothing that can be conditioned, although all layers are built."""
        if any(not layer.built for layer in self.waiting):
            return
        layers = list(walk(model)) if self.include or self.exclude else ()
        for name, rules in (("include", self.include), ("exclude", self.exclude)):
            for rule in rules or ():
                if rule not in self._matched:
                    _raise_unmatched(name, rule, model, [layer.path for layer, _ in layers if adapter_of(layer)])
                if name == "include" and rule not in self._chosen:
                    kinds = {describe(layer) for layer, above in layers if rule in _matching((rule,), layer, above)}
                    raise_unsupported(sorted(kinds), f"include={describe(rule)}")


def check_rules(name, rules):
    """Returns the rules of argument `name` as a tuple, or `None`; raises if one is no rule."""
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
                    f"`{name}` takes regular expressions, in which any characters are `.*` and not `*`. "
                    f"Received: {name}={rule!r} ({error})"
                ) from error
    return rules


def _matching(rules, layer, containers):
    """Returns the rules that name `layer` or a layer that contains it."""
    candidates = (layer, *containers)
    return {rule for rule in rules or () if any(_names(rule, candidate) for candidate in candidates)}


def _names(rule, layer):
    if isinstance(rule, str):
        return layer.path is not None and re.fullmatch(rule, layer.path) is not None
    return rule is layer


def describe(layer):
    """Returns how messages name a layer or a rule."""
    if isinstance(layer, str):
        return repr(layer)
    return f"{type(layer).__name__} layer '{layer.path or layer.name}'"


def raise_unsupported(kinds, received):
    """Raises, since none of these layers has a conditioned form."""
    raise ValueError(
        f"There is no conditioned form of {', '.join(kinds)}. Supported: {', '.join(supported_kinds())}, and subclasses that "
        "keep their `call`; a layer of your own is made known by `keras_isaac.register_layer`. Leave it out, and it trains "
        f"with its plain gradient. Received: {received}"
    )


def _raise_unmatched(name, rule, model, paths):
    hint = ""
    if isinstance(rule, str):
        nearest = sorted(paths, key=lambda path: difflib.SequenceMatcher(None, rule, path).ratio(), reverse=True)
        hint = "A string is a regular expression that must match a whole `layer.path`. "
        hint += f"The nearest: {', '.join(map(repr, nearest[:3]))}. "
    raise ValueError(f"`{name}` matches no layer of {describe(model)}. {hint}Received: {name}={describe(rule)}")
