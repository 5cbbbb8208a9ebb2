"""Texts from strangers, as tables, terminals and spreadsheets can take them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stochbn.texts import as_utf8, in_spreadsheet, unambiguous, visible

ANY = st.text(st.one_of(st.characters(), st.sampled_from("\n\x1b0ab\\xue9'=+-@\udce9\ud800\t\r")))
"""Any texts, also of lone surrogates, many of which look like escapes or formulas."""


def test_names_that_are_unicode_stay() -> None:
    for name in ("a.png", "naïve/猫.png", r"C:\data\new.png", "x~1", ""):
        assert unambiguous(name) == name


@given(st.lists(st.one_of(ANY, st.binary().map(os.fsdecode)), unique=True, max_size=8))
def test_different_names_stay_different_and_become_unicode(names: list[str]) -> None:
    shown = list(map(unambiguous, names))
    assert len(set(shown)) == len(names)
    assert [as_utf8(name) for name in shown] == shown


@pytest.mark.parametrize("name", [b"\xff", rb"\xff", rb"\\xff", b"\\\xff", rb"\\\xff", b"\xff\\xff", rb"\udcff"])
def test_a_name_does_not_look_like_another_with_its_bytes_escaped(name: bytes) -> None:
    others = [b"\xff", rb"\xff", rb"\\xff", b"\\\xff", rb"\\\xff", b"\xff\\xff", rb"\udcff"]
    alike = [other for other in others if unambiguous(os.fsdecode(other)) == unambiguous(os.fsdecode(name))]
    assert alike == [name]


def test_what_is_no_text_stays() -> None:
    assert as_utf8(3) == 3
    assert as_utf8(None) is None


@given(ANY)
def test_different_texts_stay_different_in_a_spreadsheet(text: str) -> None:
    assert in_spreadsheet(text) in (text, f"'{text}")
    assert in_spreadsheet(f"'{text}") != in_spreadsheet(text)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "-x", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "+", "-"]
)
def test_a_formula_begins_with_an_apostrophe(text: str) -> None:
    assert in_spreadsheet(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-5", "+3.5", "-1e-7", "-.5", "a=1", "'tis", "", "cat", " =1"])
def test_numbers_and_other_texts_stay_as_they_are(text: str) -> None:
    assert in_spreadsheet(text) == text


@pytest.mark.parametrize(
    "character", ["\x1b", "\x9b", "\x07", "\x08", "\r", "\n", "\x7f", "\u202e", "\u2066", "\u200f", "\u061c", "\u2028",
                  "\u200b", "\ufeff", "\u00ad", "\U000e0041", "\udc80"]
)  # fmt: skip
def test_what_acts_on_a_terminal_is_escaped(character: str) -> None:
    shown = visible(f"a{character}b")
    assert shown.startswith("a\\")
    assert shown.endswith("b")
    assert character not in shown


def test_words_of_any_script_are_shown_as_they_are() -> None:
    for text in ("नमस्\u200dते", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "猫 🐈", "שלום", r"a\x1b"):
        assert visible(text) == text
