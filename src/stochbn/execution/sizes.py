"""The number of objects as a symbol: an integer that notes what a network's Python code concludes from it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

__all__ = ["ObjectCount", "Sizes"]


MOST = 2**48
"""More objects than there can be."""


class Sizes:
    """For which numbers of objects the same is concluded: an interval about the one that a network is followed with.

    Args:
        objects: the number of objects that a network is being followed with.

    Attributes:
        low: the least number of objects of which the same is concluded.
        high: the largest.
    """

    def __init__(self, objects: int) -> None:
        self.objects = objects
        self.low, self.high = min(objects, 1), MOST

    def pin(self) -> None:
        """Note that only this number of objects is known to be treated so."""
        self.low = self.high = self.objects

    def same(self, conclusion: Callable[[int], Any]) -> None:
        """Note that the network depends on a monotone function of the number of objects."""
        outcome = conclusion(self.objects)
        self.low = self._end(self.low, lambda n: conclusion(n) == outcome)
        self.high = self._end(self.high, lambda n: conclusion(n) == outcome)

    def without(self, objects: int) -> None:
        """Note that only a number of objects other than this one is treated so."""
        if objects < self.objects:
            self.low = max(self.low, objects + 1)
        else:
            self.high = min(self.high, objects - 1)

    def hold(self, objects: int) -> bool:
        """Whether the same is concluded for so many objects."""
        return self.low <= objects <= self.high

    def _end(self, end: int, holds: Callable[[int], bool]) -> int:
        """The last number on the way to an end for which it holds; it does for the present one."""
        near, far = self.objects, end
        if holds(far):
            return far
        while abs(far - near) > 1:
            middle = (near + far) // 2
            near, far = (middle, far) if holds(middle) else (near, middle)
        return near


class ObjectCount(int):
    """The integer ``factor * objects + offset``, which stays a symbol through sums and products.

    A comparison notes its outcome, so that it is known for which other numbers of objects it is the same. Everything
    else that a program can do with an integer is taken to depend on its value.
    """

    sizes: Sizes
    factor: int
    offset: int

    def __new__(cls, sizes: Sizes, factor: int, offset: int = 0) -> ObjectCount:
        """The number ``factor * objects + offset``."""
        self = super().__new__(cls, factor * sizes.objects + offset)
        self.sizes, self.factor, self.offset = sizes, factor, offset
        return self

    def _at(self, objects: int) -> int:
        return self.factor * objects + self.offset

    def _compare(self, compare: Callable[[Any, Any], bool], other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        factor, offset = self.factor, self.offset - _offset(other)
        if isinstance(other, ObjectCount):
            factor -= other.factor
        outcome = compare(factor * self.sizes.objects + offset, 0)
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

    def __hash__(self) -> int:
        self.sizes.pin()
        return hash(_value(self))

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _linear(self, factor: int, offset: int) -> int:
        return ObjectCount(self.sizes, factor, offset) if factor else offset

    def __add__(self, other: Any) -> Any:
        if isinstance(other, ObjectCount):
            return self._linear(self.factor + other.factor, self.offset + other.offset)
        return self._linear(self.factor, self.offset + other) if _whole(other) else self._opaque(operator.add, other)

    __radd__ = __add__

    def __neg__(self) -> int:
        return self._linear(-self.factor, -self.offset)

    def __sub__(self, other: Any) -> Any:
        return self + -other if _whole(other) else self._opaque(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        if _whole(other) and not isinstance(other, ObjectCount):
            return self._linear(self.factor * other, self.offset * other)
        return self._opaque(operator.mul, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if _whole(other) and not isinstance(other, ObjectCount) and other:
            if not self.factor % other and not self.offset % other:
                return self._linear(self.factor // other, self.offset // other)
            self.sizes.same(lambda n: self._at(n) // other)
            return self._at(self.sizes.objects) // other
        return self._opaque(operator.floordiv, other)

    def __mod__(self, other: Any) -> Any:
        if _whole(other) and not isinstance(other, ObjectCount) and other and not self.factor % other:
            return self.offset % other
        return self._opaque(operator.mod, other)

    def _opaque(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        self.sizes.pin()
        return operation(_value(self), _value(other))

    def _opaque_reversed(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        self.sizes.pin()
        return operation(_value(other), _value(self))

    def __truediv__(self, other: Any) -> Any:
        return self._opaque(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._opaque_reversed(operator.truediv, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._opaque_reversed(operator.floordiv, other)

    def __rmod__(self, other: Any) -> Any:
        return self._opaque_reversed(operator.mod, other)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return self._opaque(lambda a, b: pow(a, b, modulus), other)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return self._opaque_reversed(lambda a, b: pow(a, b, modulus), other)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __and__(self, other: Any) -> Any:
        return self._opaque(operator.and_, other)

    def __or__(self, other: Any) -> Any:
        return self._opaque(operator.or_, other)

    def __rshift__(self, other: Any) -> Any:
        return self._opaque(operator.rshift, other)

    def __lshift__(self, other: Any) -> Any:
        return self._opaque(operator.lshift, other)

    def __abs__(self) -> int:
        return self if self >= 0 else -self

    def __int__(self) -> int:
        self.sizes.pin()
        return self._at(self.sizes.objects)

    def __float__(self) -> float:
        self.sizes.pin()
        return float(self._at(self.sizes.objects))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _offset(value: Any) -> Any:
    return value.offset if isinstance(value, ObjectCount) else value


def _value(value: Any) -> Any:
    return value._at(value.sizes.objects) if isinstance(value, ObjectCount) else value
