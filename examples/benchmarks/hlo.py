"""Counts what a compiled program executes, from the text of its optimized HLO, as `jax.stages.Compiled.as_text()` gives it."""

import collections
import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ?\b([a-z][\w-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
# They only name values or wait for them, or are counted by what they contain.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE_CALLS = {"ConcatBitcast"}


@dataclasses.dataclass
class Counts:
    """What one run of a computation executes.

    Args:
        operations: counter of the operations, by name without number; a fusion or a library call is one. On a GPU each is
            launched.
        loops: counter of the loops' runs, by their number of trips (`None`: unknown, and then counted as one).
        calls: counter of the calls of libraries and custom kernels, by target.
        cycles: integer, the sum of the compiler's estimates, which a TPU's gives. It has none for library calls.
        bytes: integer, the sizes of the operands and results of all operations. Too large where one reads or writes a part.
    """

    operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    cycles: int = 0
    bytes: int = 0

    def add(self, other, times=1):
        """Adds what `times` runs of another computation execute."""
        for name in ("operations", "loops", "calls"):
            for key, count in getattr(other, name).items():
                getattr(self, name)[key] += count * times
        self.cycles += other.cycles * times
        self.bytes += other.bytes * times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    operands: list
    attributes: str
    size: int

    def computations(self, *keys):
        """Returns the names of the computations that attributes refer to: `key=%name` or `key={%name, %name}`."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.-]+", names)]


def count(text):
    """Returns the `Counts` of a program, given the text of its optimized HLO."""
    computations, entry = _parse(text)
    return _count(computations, entry)


def _parse(text):
    """Returns each computation's instructions, by name, and the name of the entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            is_entry, current = head.groups()
            computations[current] = []
            entry = current if is_entry else entry
        elif current and (match := _INSTRUCTION.match(line)):
            name, kind, opcode, operands, attributes = match.groups()
            if opcode == "constant":
                attributes = operands
            operands = re.findall(r"%([\w.-]+)", operands)
            computations[current].append(_Instruction(name, opcode, operands, attributes, _size(kind)))
    if entry is None:
        raise ValueError(f"The text of an HLO module has an `ENTRY` computation. Received: {text[:200]!r}")
    return computations, entry


def _size(kind):
    """Returns the bytes of a type, such as `(f32[60,784]{1,0}, pred[])`."""
    arrays = ((int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(kind))
    return sum(bits * math.prod(int(size) for size in shape.split(",") if size) for bits, shape in arrays) // 8


def _count(computations, name):
    counts = Counts()
    sizes = {instruction.name: instruction.size for instruction in computations[name]}
    for instruction in computations[name]:
        opcode, target = instruction.opcode, re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
        if opcode == "while":
            trips = _trips(computations, instruction)
            counts.loops[trips] += 1
            for body in instruction.computations("body"):
                counts.add(_count(computations, body), 1 if trips is None else trips)
        elif opcode == "conditional":
            branches = instruction.computations("branch_computations", "true_computation", "false_computation")
            # Which one runs is known only then: the longest.
            counts.add(max((_count(computations, branch) for branch in branches), key=lambda each: each.operations.total()))
        elif opcode in ("call", "async-start"):
            for called in instruction.computations("to_apply", "calls"):
                counts.add(_count(computations, called))
        elif not (opcode in _FREE or opcode.endswith("-done") or (target and target.group(1) in _FREE_CALLS)):
            counts.operations[re.sub(r"(\.\d+)+$", "", target.group(1) if target else instruction.name)] += 1
            counts.calls.update(target.groups() if target else ())
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            counts.cycles += int(estimate.group(1)) if estimate else 0
            # The start of a copy returns its operand too.
            operands = 0 if opcode.endswith("-start") else sum(sizes[operand] for operand in instruction.operands)
            counts.bytes += instruction.size + operands
    return counts


def _trips(computations, loop):
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    # A TPU's program does not say: the only number in the condition is the limit.
    (condition,) = loop.computations("condition")
    limits = [each.attributes for each in computations[condition] if each.opcode == "constant"]
    return int(limits[0]) if len(limits) == 1 and limits[0].isdecimal() else None
