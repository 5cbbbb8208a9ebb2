"""How all figures look: one colour for a method everywhere, and figures as files or as part of a page."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stochbn.files import write
from stochbn.texts import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "SEQUENCE", "Line", "inline", "line_of", "save"]

COLORS = {"plain": "#767676", "SBN": "#d55e00", "Deep Ensembles": "#0072b2", "Dropout": "#009e73"}
"""The colour of each method: of the palette of Okabe and Ito (2008), which the colour-blind can tell apart."""

SEQUENCE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#000000")
"""Colours for what is no method, in the order in which they are used; of the same palette but for the brown."""

NUMBER = re.compile(r"\$\\mathdefault\{[-0-9.^{}\\times ]*\}\$")
"""A power of ten as Matplotlib writes it beside an axis."""

INK = "#010203"
"""What stands for the colour of the text around it in a figure that is part of a page."""


class Line(NamedTuple):
    """How a method is drawn."""

    label: str
    color: str
    style: str


def line_of(method: str, sbn: bool) -> Line:
    """How a method is drawn: a single network with SBN has a colour of its own, others are dashed with SBN.

    Args:
        method: ``plain``, ``Deep Ensembles`` or ``Dropout``.
        sbn: whether the statistics are drawn.

    >>> line_of("Dropout", True)
    Line(label='Dropout + SBN', color='#009e73', style='--')
    """
    if method == "plain":
        return Line("SBN", COLORS["SBN"], "-") if sbn else Line("plain", COLORS["plain"], "-")
    return Line(f"{method} + SBN", COLORS[method], "--") if sbn else Line(method, COLORS[method], "-")


def save(figure: Figure, path: Path, endings: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """Write a figure as PNG and SVG; the same figure becomes the same files.

    Args:
        figure: the figure.
        path: where to, without an ending.
        endings: of the files to write.

    Returns:
        The files written.
    """
    import matplotlib as mpl

    _show_names_as_they_are(figure)
    files = [path.with_name(path.name + ending) for ending in endings]
    with mpl.rc_context({"svg.hashsalt": "stochbn"}):
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            write(file, functools.partial(figure.savefig, dpi=160, metadata=metadata))
    return files


def inline(figure: Figure, name: str) -> str:
    """A figure as an ``svg`` element of a page: it takes the colour of the text around it and the width it is given.

    Args:
        figure: the figure; its texts and axes are recoloured.
        name: told apart from the other figures of the page by it; letters and digits.
    """
    import matplotlib as mpl

    _show_names_as_they_are(figure)
    _recolour(figure)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "stochbn", "svg.fonttype": "none"}):
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type", "Format"))
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # several figures share a page
    return re.sub(
        r'<svg (?:[\w:]+="[^"]*"\s*)*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1
    )


def _show_names_as_they_are(figure: Figure) -> None:
    """Escape in texts what no font has, and do not take a dollar sign in a name for a formula."""
    from matplotlib.text import Text

    for words in figure.findobj(Text):
        assert isinstance(words, Text)
        text = words.get_text()
        words.set_text("\n".join(map(visible, text.split("\n"))))
        if "$" in text and not NUMBER.fullmatch(text):
            words.set_parse_math(False)


def _recolour(figure: Figure) -> None:
    """Give texts, ticks and frames the colour that stands for that of a page's text."""
    from matplotlib.text import Text

    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        for grid in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            grid.set_color(INK)
            grid.set_alpha(0.15)
    for legend in figure.findobj(_is_legend):
        legend.get_frame().set_alpha(0)  # type: ignore[attr-defined]
    for words in figure.findobj(Text):
        words.set_color(INK)


def _is_legend(artist: object) -> bool:
    from matplotlib.legend import Legend

    return isinstance(artist, Legend)
