"""The number of examples as a symbol: an integer that records what Python code concludes from it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ExampleCount", "Shape", "Sizes", "is_symbol", "plain", "symbols"]


MOST = 2**48
"""A number larger than any number of examples."""


class Sizes:
    """The numbers of examples for which the traced conclusions hold: an interval about the traced number.

    Args:
        examples: the traced number of examples.

    Attributes:
        low: the smallest number of examples for which they hold.
        high: the largest number.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.low, self.high = min(examples, 1), MOST

    def pin(self) -> None:
        """Record that conclusions hold only for this number of examples."""
        self.low = self.high = self.examples

    def same(self, conclusion: Callable[[int], Any]) -> None:
        """Record that the network depends on a monotone function of the number of examples."""
        outcome = conclusion(self.examples)
        self.low = self._end(self.low, lambda n: conclusion(n) == outcome)
        self.high = self._end(self.high, lambda n: conclusion(n) == outcome)

    def without(self, examples: int) -> None:
        """Record that conclusions do not hold for this number of examples."""
        if examples < self.examples:
            self.low = max(self.low, examples + 1)
        else:
            self.high = min(self.high, examples - 1)

    def meet(self, other: Sizes) -> None:
        """Intersect with the conclusions from another number of examples."""
        self.low, self.high = max(self.low, other.low), min(self.high, other.high)

    def hold(self, examples: int) -> bool:
        """Whether conclusions hold for this number of examples."""
        return self.low <= examples <= self.high

    def _end(self, end: int, holds: Callable[[int], bool]) -> int:
        """The last number towards an end for which a condition holds; it holds for the traced number."""
        near, far = self.examples, end
        if holds(far):
            return far
        while abs(far - near) > 1:
            middle = (near + far) // 2
            near, far = (middle, far) if holds(middle) else (near, middle)
        return near


class ExampleCount(torch.SymInt):
    """The integer ``factor * examples + offset``, which stays a symbol through sums and products.

    A comparison records for which numbers of examples its outcome is the same. Every other use of the integer counts as
    dependent on its value. It claims to be an ``int``, but is not a subclass, because C code would read the value
    unseen (``len``, ``range``, an index of a list, ``math.log``). Tensor operations take it as an argument.
    """

    def __init__(self, sizes: Sizes, factor: int, offset: int = 0) -> None:
        self.sizes, self.factor, self.offset = sizes, factor, offset

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return int

    def __copy__(self) -> ExampleCount:
        return self

    def __deepcopy__(self, memo: Any) -> ExampleCount:
        return self

    def at(self, examples: int) -> int:
        """The integer for a number of examples."""
        return self.factor * examples + self.offset

    def plain(self) -> int:
        """The integer, for an operation whose use of it is recorded."""
        return self.at(self.sizes.examples)

    def _compare(self, compare: Callable[[Any, Any], bool], other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        number: Any = other
        factor, offset = self.factor, self.offset
        if is_symbol(other):
            factor, offset = factor - number.factor, offset - number.offset
        else:
            offset = offset - number
        outcome = compare(factor * self.sizes.examples + offset, 0)
        if not factor:
            return outcome
        if compare not in (operator.eq, operator.ne):
            self.sizes.same(lambda n: compare(factor * n + offset, 0))
        elif outcome == (compare is operator.eq):
            self.sizes.pin()
        elif (root := -offset / factor) == int(root):
            self.sizes.without(int(root))
        return outcome

    def __lt__(self, other: Any) -> Any:
        return self._compare(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._compare(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._compare(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._compare(operator.ge, other)

    def __eq__(self, other: object) -> Any:
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compare(operator.ne, other)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _linear(self, factor: int, offset: int) -> Any:
        return ExampleCount(self.sizes, factor, offset) if factor else offset

    def __add__(self, other: Any) -> Any:
        if is_symbol(other):
            return self._linear(self.factor + other.factor, self.offset + other.offset)
        return self._linear(self.factor, self.offset + other) if _whole(other) else self._number() + other

    __radd__ = __add__

    def __neg__(self) -> Any:
        return self._linear(-self.factor, -self.offset)

    def __pos__(self) -> ExampleCount:
        return self

    def __sub__(self, other: Any) -> Any:
        return self + -other if _whole(other) else self._number() - other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        if _whole(other) and not is_symbol(other):
            return self._linear(self.factor * other, self.offset * other)
        return self._number() * other

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not _whole(other) or is_symbol(other) or not other:
            return self._number() // other
        if not self.factor % other and not self.offset % other:
            return self._linear(self.factor // other, self.offset // other)
        self.sizes.same(lambda n: self.at(n) // other)
        return self.plain() // other

    def __mod__(self, other: Any) -> Any:
        if _whole(other) and not is_symbol(other) and other and not self.factor % other:
            return self.offset % other
        return self._number() % other

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(self._number(), other, modulus)

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    def _number(self) -> int:
        self.sizes.pin()
        return self.plain()

    __int__ = __index__ = __trunc__ = __floor__ = __ceil__ = _number

    def __round__(self, digits: int | None = None) -> int:
        return self._number()

    def __float__(self) -> float:
        return float(self._number())

    def __invert__(self) -> int:
        return ~self._number()

    def __hash__(self) -> int:
        return hash(self._number())

    def __repr__(self) -> str:
        return repr(self._number())

    def __str__(self) -> str:
        return str(self._number())

    def __format__(self, spec: str) -> str:
        return format(self._number(), spec)

    def __getattr__(self, name: str) -> Any:
        """Other attributes of integers, such as ``bit_length``."""
        if name.startswith("_") or not hasattr(int, name):
            raise AttributeError(name)
        return getattr(self._number(), name)


def _of_the_number(name: str) -> Callable[[ExampleCount, Any], Any]:
    def method(self: ExampleCount, other: Any) -> Any:
        found = getattr(int, name)(self._number(), other)
        return found if found is not NotImplemented else getattr(float, name)(float(self), other)

    return method


for _name in ("truediv", "rtruediv", "rfloordiv", "rmod", "rdivmod", "rpow"):
    setattr(ExampleCount, f"__{_name}__", _of_the_number(f"__{_name}__"))
for _name in ("and", "or", "xor", "lshift", "rshift"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(ExampleCount, _full, _of_the_number(_full))


class Shape(tuple[Any, ...]):
    """The shape of a tensor, with a symbol for the axis of the examples."""

    def numel(self) -> Any:
        """The product of all lengths."""
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found


def is_symbol(value: Any) -> bool:
    """Whether a value is an `ExampleCount`, which claims to be an ``int``."""
    return issubclass(type(value), ExampleCount)


def plain(value: Any) -> Any:
    """Replace symbols by integers, also in tuples, lists and slices."""
    if is_symbol(value):
        return value.plain()
    if isinstance(value, Shape):
        return torch.Size(map(plain, value))
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(each) for key, each in value.items()}
    return slice(plain(value.start), plain(value.stop), plain(value.step)) if isinstance(value, slice) else value


def symbols(value: Any) -> list[ExampleCount]:
    """All symbols among arguments."""
    if is_symbol(value):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, slice):
        value = value.start, value.stop, value.step
    return [found for each in value for found in symbols(each)] if isinstance(value, (tuple, list)) else []


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
