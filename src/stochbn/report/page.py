"""A page about an evaluation: one HTML file that needs nothing else, for a browser or a printer."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.files import write_bytes
from stochbn.predictions import entropy
from stochbn.report import curves
from stochbn.report.objects import Shown, Source, extremes
from stochbn.report.style import inline, line_of
from stochbn.report.tables import Table
from stochbn.report.words import summary

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.evaluation.methods import Method
    from stochbn.posteriors import Posterior

__all__ = ["Curve", "Page", "page_of", "write_page"]


@dataclass(frozen=True)
class Curve:
    """A figure of a page: its heading, what is seen in it, and the figure as an ``svg`` element."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        title: its heading.
        summary: what was found, in sentences.
        tables: the numbers.
        curves: the figures.
        method: what the objects below were predicted with.
        least: the objects it is least certain of.
        most: those it is most certain of.
        facts: whatever the numbers depend on, what they cost, and how they were made.
    """

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    curves: Sequence[Curve]
    method: str
    least: Sequence[Shown]
    most: Sequence[Shown]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_pictures(self) -> bool:
        """Whether the objects are images."""
        return any(one.picture for one in (*self.least, *self.most))

    def table(self, objects: Sequence[Shown]) -> Table:
        """Objects as a table, for those that are no images."""
        columns = ["object", "class", "most probable", "entropy", "aleatoric", "epistemic"]
        rows = []
        for one in objects:
            top = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in one.top)
            parts = ["-" if part is None else f"{part:.3f}" for part in (one.entropy, one.aleatoric, one.epistemic)]
            rows.append([one.name, one.label, top, *parts])
        return Table("objects", columns, rows)


def page_of(
    title: str,
    found: Sequence[Method],
    scores: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    data: tuple[str, str | None],
    source: Source,
    classes: Sequence[str],
    facts: Mapping[str, str],
    more: Sequence[Curve] = (),
    posteriors: Sequence[Posterior] = (),
) -> Page:
    """Put a page together.

    Args:
        title: its heading.
        found: the methods.
        scores: their scores.
        tables: the numbers as tables.
        data: the names of the data of known and, if there is any, of unknown classes.
        source: names and pictures of the known objects.
        classes: the names of the classes; none are numbers.
        facts: whatever the numbers depend on, what they cost, and how they were made.
        more: figures to show behind those of the evaluation.
        posteriors: that were drawn from, as far as they are known.

    Raises:
        ValueError: the predictions are dense.
    """
    if found[0].known.ndim != 2:
        raise ValueError(f"a page shows one prediction for each object, got probabilities {list(found[0].known.shape)}")
    shown = next((method for method in found if method.sbn), found[0])
    least, most = extremes(shown.known, shown.labels, shown.expected_entropy, source, classes)
    name = line_of(shown.name, shown.sbn).label
    said = [*summary(scores, *data, posteriors), *_least_certain(shown, name)]
    return Page(title, said, tables, [*_curves(found), *more], name, least, most, facts)


def _least_certain(method: Method, name: str) -> list[str]:
    """How many errors are among the tenth of the objects that a method is least certain of, in a sentence."""
    wrong = (method.known.argmax(1) != method.labels).double()
    order = entropy(method.known).argsort(descending=True)
    cut = len(order) // 10
    if not cut:
        return []
    least, others = wrong[order[:cut]].mean().item(), wrong[order[cut:]].mean().item()
    return [
        f"Of the tenth of the objects that {name} is least certain of, {100 * least:.1f} % are classified wrongly; of "
        f"the others, {100 * others:.2f} %."
    ]


def write_page(path: Path, page: Page) -> None:
    """Write a page.

    Raises:
        OSError: the file cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stochbn.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = importlib.resources.files("stochbn.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html").render(
        page=page, style=Markup(style), script=Markup(script), digest=digest, svg=Markup
    )
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files may be no Unicode


def _curves(found: Sequence[Method]) -> list[Curve]:
    """The figures of an evaluation."""
    single = [method for method in found if method.name == found[0].name]
    classes = found[0].known.shape[1]
    sure = {_key(m): (m.known.max(1).values, m.known.argmax(1) == m.labels) for m in single}
    uncertain = {_key(m): (entropy(m.known), m.known.argmax(1) != m.labels) for m in found}
    known = {_key(m): entropy(m.known) for m in single}
    unknown: dict[tuple[str, bool], Tensor] = {_key(m): entropy(m.unknown) for m in single if m.unknown is not None}
    shown = [
        (
            "Is it as often right as it says?",
            "Reliability: on the dotted line, of the objects that get a probability of 80 % four fifths are right; "
            "below it the method is too sure. Bars are 95 % intervals, long where there are few objects.",
            curves.reliability(sure),
        ),
        (
            "Is it wrong where it is unsure?",
            "Selective prediction: how many answers are wrong if only the most certain ones are given. A curve that "
            "stays low for longer is better; at 100 % all objects are answered.",
            curves.risk_coverage(uncertain),
        ),
        (
            "How unsure is it of known and of unknown objects?" if unknown else "How unsure is it?",
            "Entropy of the predictive distribution. A curve on the left is of certain predictions"
            + ("; the further those of known and unknown objects are apart, the better." if unknown else "."),
            curves.known_and_unknown(known, unknown, classes=classes),
        ),
    ]
    if len(unknown) < sum(m.unknown is not None for m in found):
        every = {_key(m): entropy(m.unknown) for m in found if m.unknown is not None}
        caption = "Entropy of objects of unknown classes, of every method: lower and further right is better."
        shown.append(
            ("How do methods compare on unknown objects?", caption, curves.entropies_of_unknown(every, classes=classes))
        )
    return [Curve(title, caption, inline(figure, f"f{i}")) for i, (title, caption, figure) in enumerate(shown)]


def _key(method: Method) -> tuple[str, bool]:
    return method.name, method.sbn
