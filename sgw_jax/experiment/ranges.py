"""What a key may hold, in words and as a test: the vocabulary of keys.py."""

import abc
import dataclasses
import difflib
import math
import numbers
from collections.abc import Collection
from typing import Any

from sgw_jax.data_pipelines.errors import InputError

LARGEST = 2**31 - 1  # the whole numbers that arrays on devices hold


class Range(abc.ABC):
    """A set of values."""

    @property
    @abc.abstractmethod
    def words(self) -> str:
        """What follows "it must be"."""

    @abc.abstractmethod
    def __contains__(self, value: Any) -> bool: ...

    def check(self, name: str, value: Any) -> None:
        """Raises an InputError with the name, the value and what is allowed, unless the value is in the set."""
        if value not in self:
            raise InputError(f"{name} is {value!r}; it must be {self.words}.{self.hint(value)}")

    def hint(self, value: Any) -> str:
        """What helps with this value, as a sentence, or nothing."""
        return ""


@dataclasses.dataclass(frozen=True)
class Interval(Range):
    """The finite numbers, or the whole ones, from ``low`` to ``high``; ``ends`` says which of the two belong to it.

    ``LARGEST`` is no bound of its own: nothing is said of it. JSON and configuration files know numbers of several
    types: all are taken, but True and False are none.
    """

    low: float
    high: float = math.inf
    ends: str = "[]"
    whole: bool = False

    @property
    def words(self) -> str:
        if self.high not in (LARGEST, math.inf):
            return f"in {self.ends[0]}{_brief(self.low)}, {_brief(self.high)}{self.ends[1]}"
        if self.ends[0] == "[":
            return f"at least {_brief(self.low)}"
        return "positive" if self.low == 0 else f"above {_brief(self.low)}"

    def __contains__(self, value: Any) -> bool:
        if not self._is_number(value):
            return False
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return bool(above and (value <= self.high if self.ends[1] == "]" else value < self.high))

    def hint(self, value: Any) -> str:
        if not self._is_number(value):
            return f" Give a {'whole' if self.whole else 'finite'} number."
        return " Give a number below 2^31." if self.whole and value > LARGEST == self.high else ""

    def _is_number(self, value: Any) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class OneOf(Range):
    """One of some names; those of a family are looked up when they are asked for, so that a user's own count."""

    names: Collection[str]

    @property
    def words(self) -> str:
        return f"one of {sorted(self.names)}"

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.names

    def hint(self, value: Any) -> str:
        near = difflib.get_close_matches(str(value), self.names, n=1)
        return f" Did you mean {near[0]!r}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Kind(Range):
    """Every value of a type."""

    kind: type | tuple[type, ...]
    words: str = ""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, self.kind)


@dataclasses.dataclass(frozen=True)
class Pair(Range):
    """Two values of a set; ``ascending``: the second is not smaller."""

    of: Range
    ascending: bool = False

    @property
    def words(self) -> str:
        return f"two numbers, each {self.of.words}" + (", the smaller first" if self.ascending else "")

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) != 2 or not all(item in self.of for item in value):
            return False
        return not self.ascending or value[0] <= value[1]


@dataclasses.dataclass(frozen=True)
class Several(Range):
    """Any number of values of a set, or none."""

    of: Range

    @property
    def words(self) -> str:
        return f"(), or numbers, each {self.of.words}"

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, tuple | list) and all(item in self.of for item in value)


@dataclasses.dataclass(frozen=True)
class Names(Range):
    """Names, each once, at least one if not ``or_none``; which there are is not said here."""

    or_none: bool = False

    @property
    def words(self) -> str:
        return "(), or names, each once" if self.or_none else "one name or more, each once"

    def __contains__(self, value: Any) -> bool:
        named = isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)
        return named and len(set(value)) == len(value) and (self.or_none or len(value) > 0)


@dataclasses.dataclass(frozen=True)
class Either(Range):
    """A value of a set, or one value more."""

    of: Range
    other: Any = None

    @property
    def words(self) -> str:
        return f"{self.of.words}, or {self.other!r}"

    def __contains__(self, value: Any) -> bool:
        return (value is None if self.other is None else value == self.other) or value in self.of

    def hint(self, value: Any) -> str:
        return self.of.hint(value)


def whole(low: int, high: int = LARGEST, ends: str = "[]") -> Interval:
    """The whole numbers between two."""
    return Interval(low, high, ends, whole=True)


def _brief(value: float) -> str:
    if value == int(value) and value >= 2**16 and int(value).bit_count() == 1:
        return f"2^{int(value).bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def optional(of: Range) -> Either:
    """The set and None."""
    return Either(of)


POSITIVE = Interval(0, ends="(]")
NOT_NEGATIVE = Interval(0)
COUNT = whole(1)
SHARE = Interval(0, 1, "(]")  # of something that is not nothing
PROPER_SHARE = Interval(0, 1, "[)")  # that leaves something
FLAG = Kind(bool, "True or False")
TEXT = Kind(str, "text")
