"""What a compiled program moves, read from its text: bytes between devices by collective, and to and from memory."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They move nothing by themselves: names for what is there, or control, whose bodies are counted.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "opt-barrier", "domain"}

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)\}?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str  # the text between the parentheses

    @property
    def path(self) -> str:
        """Where in the traced program it comes from: "jit(step)/jvp(Model)/backbone/..."; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device and one run of the program.

    exchanged: bytes that a device sends, by kind of collective, if each goes round a ring: of n devices and a result
    of b bytes an all-gather sends b (n - 1) / n, a reduce-scatter that of its operand, an all-reduce twice that, a
    permutation b. number: how many of each kind run. memory: bytes read from and written to the main memory by every
    fused operation, without what stays in on-chip memory where the compiler says so; layouts' padding is not counted.
    """

    exchanged: dict[str, float]
    number: dict[str, int]
    memory: float


def traffic(program: str) -> Traffic:
    """Reads the text of a compiled program (``compiled.as_text()``).

    Loops count as often as they run, where the text or a comparison with a constant says how often, else once. A
    collective that the compiler has cut into pieces (of one channel) counts once.
    """
    computations, entry = parse(program)
    runs = _runs(computations, entry)
    exchanged: dict[str, float] = {}
    number: dict[str, int] = {}
    channels: dict[str, tuple[int, str, float]] = {}
    for name, times in runs.items():
        fused = name.startswith("all-reduce-scatter")  # how a TPU's compiler writes a reduce-scatter
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                sent = _sent(instruction, kind)
                kind, sent = ("reduce-scatter", sent / 2) if fused and kind == "all-reduce" else (kind, sent)
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = channel[1] if channel else f"{name}/{instruction.name}"
                channels[key] = max(channels.get(key, (0, kind, 0.0)), (times, kind, sent))
    for times, kind, sent in channels.values():
        exchanged[kind] = exchanged.get(kind, 0) + times * sent
        number[kind] = number.get(kind, 0) + times
    return Traffic(exchanged, number, sum(_memory_by(computations, entry, lambda _: "").values()))


def memory_by(program: str, label: Callable[[Instruction], str]) -> dict[str, float]:
    """`Traffic.memory` by what ``label`` says of each operation."""
    return _memory_by(*parse(program), label)


def parse(program: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name; and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _instruction(line)) is not None:
            current[found.name] = found
    return computations, entry


def _memory_by(
    computations: dict[str, dict[str, Instruction]], entry: str, label: Callable[[Instruction], str]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, times in _runs(computations, entry, fusions=False).items():
        for instruction in computations[name].values():
            key = label(instruction)
            found[key] = found.get(key, 0.0) + times * _memory(instruction, computations[name], computations)
    return found


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name.removeprefix("%"), shape, opcode, operands, rest[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def _runs(computations: dict[str, dict[str, Instruction]], entry: str, fusions: bool = True) -> dict[str, int]:
    """How often each computation runs; with ``fusions`` also those inside fused operations."""
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations.get(name, {}).values():
            if instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                if body:
                    visit(body[1], times * _turns(instruction, computations))
            elif fusions or instruction.opcode != "fusion":
                if instruction.opcode in ("reduce", "sort", "scatter", "map", "select-and-scatter", "reduce-window"):
                    continue  # what they apply is a scalar function
                for called in _called(instruction.attributes):
                    visit(called, times)

    visit(entry, 1)
    return {name: times for name, times in runs.items() if name in computations}


def _called(attributes: str) -> Iterator[str]:
    for names in _CALLED.findall(attributes):
        for name in names.split(", "):
            yield name.removeprefix("%")


def _turns(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    if known := re.search(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    instructions = computations.get(condition[1], {}).values() if condition else ()
    # A counted loop compares its counter with one constant.
    limits = [int(x.arguments) for x in instructions if x.opcode == "constant" and x.arguments.isdigit()]
    return max(limits, default=1) or 1


def _sent(instruction: Instruction, kind: str) -> float:
    shapes = _SHAPE.findall(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
    result = sum(_size(*shape) for shape in shapes)
    devices = group_size(instruction.attributes)
    share = (devices - 1) / devices
    return {
        "all-reduce": 2 * result * share,
        "all-gather": result * share,
        "reduce-scatter": result * (devices - 1),
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]


def group_size(attributes: str) -> int:
    """How many devices take part in one collective, from its replica groups in any of XLA's three notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return 2  # source-target pairs


def _memory(instruction: Instruction, around: dict[str, Instruction], computations: dict) -> float:
    """Bytes that an instruction reads and writes in the main memory."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * _off_chip(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _off_chip(around[instruction.operands[1]].shape) if len(instruction.operands) > 1 else 0
    if instruction.opcode == "slice-start":  # operand, result, control: what is read is the size of the result
        result = _SHAPE.findall(instruction.shape)[1]
        return _size(*result) * (1 if "S(" in result[2] else 2)
    if instruction.opcode == "copy-start":
        return sum(_size(*shape) for shape in _SHAPE.findall(instruction.shape)[:2] if "S(" not in shape[2])
    written = _off_chip(instruction.shape)
    read = [_off_chip(around[name].shape) if name in around else 0.0 for name in instruction.operands]
    inner = next((computations[name] for name in _called(instruction.attributes) if name in computations), None)
    if instruction.opcode == "fusion" and inner is not None:
        parameters = {int(x.arguments): x.name for x in inner.values() if x.opcode == "parameter"}
        for place, name in parameters.items():
            if place < len(read):
                updated = _updated(inner, name)
                if updated is not None:  # in place: of a large result only the update is written
                    written = max(written - read[place], 0) + min(read[place], updated)
                    read[place] = 0
                elif read[place]:
                    read[place] = min(read[place], _read(inner, name, computations))
    return written + sum(read)


def _read(inner: dict[str, Instruction], parameter: str, computations: dict[str, dict[str, Instruction]]) -> float:
    """Bytes of a fused operation's parameter that are read: of one that is sliced, in it or deeper, the slices."""
    total = 0.0
    for user in inner.values():
        if parameter not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "gather"):
            total += _off_chip(user.shape, on_chip=True)
            continue
        deeper = next((computations[name] for name in _called(user.attributes) if name in computations), {})
        place = str(user.operands.index(parameter))
        names = [x.name for x in deeper.values() if x.opcode == "parameter" and x.arguments == place]
        if user.opcode != "fusion" or not names:
            return math.inf
        total += _read(deeper, names[0], computations)
    return total or math.inf


def _updated(inner: dict[str, Instruction], parameter: str) -> float | None:
    """Bytes that a fused operation changes in a parameter which it otherwise passes on; None if it does not."""
    users = [x for x in inner.values() if parameter in x.operands]
    if not users or any(x.opcode != "dynamic-update-slice" or x.operands[0] != parameter for x in users):
        return None
    return sum(_off_chip(inner[x.operands[1]].shape, on_chip=True) for x in users)


def _off_chip(shape: str, on_chip: bool = False) -> float:
    return sum(_size(*found) for found in _SHAPE.findall(shape) if on_chip or "S(" not in found[2])


def _size(kind: str, dims: str, layout: str) -> float:
    return BYTES.get(kind, 1 if kind.startswith("f8") else 0) * math.prod(int(n) for n in dims.split(",") if n)
