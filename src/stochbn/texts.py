"""Make untrusted texts, such as names of files, safe for tables, terminals and spreadsheets."""

from __future__ import annotations

import re
import unicodedata
from typing import TypeVar

__all__ = ["as_utf8", "in_spreadsheet", "unambiguous", "visible"]

T = TypeVar("T")

ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4})")
"""What could be an escape that `unambiguous` writes."""

FORMULA = re.compile("('*)[=+\\-@\t\r\n\uff0b\uff0d\uff1d\uff20]", re.DOTALL)
"""How a text begins that a spreadsheet would run as a formula, in ASCII or full width; apostrophes may precede it."""

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

JOINERS = "\u200c\u200d"
"""Characters without a width that words of some scripts are written with."""


def unambiguous(name: str) -> str:
    r"""A name that is valid Unicode, whatever the bytes are that it was read from; two different names stay different.

    A byte that is not UTF-8, which Python reads as a lone surrogate, becomes ``\xe9``, and control characters are
    escaped alike. A name that is changed, or that already has such an escape, gets its backslashes doubled.

    >>> unambiguous("a.png"), unambiguous("no\udce9.png"), unambiguous(r"no\xe9.png")
    ('a.png', 'no\\xe9.png', 'no\\\\xe9.png')
    """
    if ESCAPED.search(name) or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        name = "".join(map(_escaped, name.replace("\\", "\\\\")))
    return name


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if unicodedata.category(character) == "Cc" else as_utf8(character)


def as_utf8(value: T) -> T:
    """A text without lone surrogates, which no file in UTF-8 can hold; what is no text stays as it is."""
    if not isinstance(value, str):
        return value
    return value.encode(errors="backslashreplace").decode()  # type: ignore[return-value]


def visible(text: str) -> str:
    r"""A text on one line that cannot control a terminal, or show its characters in another order than they have.

    Control characters, marks of direction, characters without a width, separators of lines and lone surrogates are
    escaped. Joiners, which some scripts need, stay.

    >>> visible("cat\x1b[2J\u202egnp"), visible("two\nlines")
    ('cat\\x1b[2J\\u202egnp', 'two\\nlines')
    """
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    return character not in JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def in_spreadsheet(text: str) -> str:
    """A text that a spreadsheet shows and does not run: an apostrophe goes before what begins like a formula.

    Numbers stay as they are, as running them changes nothing. Where a text begins with apostrophes and then like a
    formula, it gets one more, so that different texts stay different.

    Source: OWASP, CSV Injection.

    >>> in_spreadsheet("=1+1"), in_spreadsheet("-5"), in_spreadsheet("a=1")
    ("'=1+1", '-5', 'a=1')
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text
