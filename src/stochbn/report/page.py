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
from stochbn.report.answering import answering_table, compared_table, surest
from stochbn.report.confusion import Matrix, class_table, confusion_table, confusions, matrix_of
from stochbn.report.objects import Shown, Source, extremes
from stochbn.report.style import inline, line_of
from stochbn.report.tables import Table
from stochbn.report.words import summary

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.evaluation.methods import Method
    from stochbn.posteriors import Posterior
    from stochbn.tasks.base import Panel

__all__ = ["Boxed", "Curve", "Page", "Rectangle", "Section", "curves_of", "page_of", "write_page"]


@dataclass(frozen=True)
class Curve:
    """A figure of a page: its heading, what is seen in it, and the figure as an ``svg`` element."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Rectangle:
    """A box on a picture: left, top, right and bottom in pixels; it is right, wrong, or a true one that was missed."""

    sides: Sequence[float]
    kind: str
    opacity: float


@dataclass(frozen=True)
class Boxed:
    """A picture with boxes.

    Attributes:
        name: what it is called.
        picture: an address that holds all of it.
        width: pixels in which boxes are measured.
        height: likewise.
        boxes: the boxes.
        lines: what is said of them.
    """

    name: str
    picture: str
    width: int
    height: int
    boxes: Sequence[Rectangle]
    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A part of a page with tables of its own.

    Attributes:
        key: its place in addresses.
        title: its heading.
        note: how it is read, in sentences.
        tables: its numbers.
        matrix: a matrix of confusions, if it has one.
        pictures: pictures with boxes.
    """

    key: str
    title: str
    note: str
    tables: Sequence[Table]
    matrix: Matrix | None = None
    pictures: Sequence[Boxed] = ()


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        title: its heading.
        summary: what was found, in sentences.
        tables: the numbers.
        curves: the figures.
        method: what the examples below were predicted with.
        least: the examples it is least certain of.
        most: those it is most certain of.
        facts: whatever the numbers depend on, what they cost, and how they were made.
        head: what was evaluated: the posterior, how it was chosen, and what an example costs.
        sections: what is shown behind the numbers.
    """

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    curves: Sequence[Curve]
    method: str
    least: Sequence[Shown]
    most: Sequence[Shown]
    facts: Mapping[str, str] = field(default_factory=dict)
    head: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()

    @property
    def has_pictures(self) -> bool:
        """Whether the examples are images."""
        return any(one.picture for one in (*self.least, *self.most))

    def table(self, objects: Sequence[Shown]) -> Table:
        """Examples as a table, for those that are no images."""
        columns = ["example", "class", "most probable", "entropy", "aleatoric", "epistemic"]
        rows = []
        for one in objects:
            top = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in one.top)
            parts = ["-" if part is None else f"{part:.3f}" for part in (one.entropy, one.aleatoric, one.epistemic)]
            rows.append([one.name, one.label, top, *parts])
        return Table("examples", columns, rows)


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
    head: Mapping[str, str] | None = None,
) -> Page:
    """Put a page together.

    Args:
        title: its heading.
        found: the methods.
        scores: their scores.
        tables: the numbers as tables.
        data: the names of the data of known and, if there is any, of unknown classes.
        source: names and pictures of the known examples.
        classes: the names of the classes; none are numbers.
        facts: whatever the numbers depend on, what they cost, and how they were made.
        more: figures to show behind those of the evaluation.
        posteriors: that were drawn from, as far as they are known.
        head: what was evaluated; see `stochbn.report.chosen`.

    Raises:
        ValueError: the predictions are dense.
    """
    if found[0].known.ndim != 2:
        raise ValueError(
            f"a page shows one prediction for each example, got probabilities {list(found[0].known.shape)}"
        )
    shown = next((method for method in found if method.sbn), found[0])
    least, most = extremes(shown.known, shown.labels, shown.expected_entropy, source, classes)
    name = line_of(shown.name, shown.sbn).label
    said = [*summary(scores, *data, posteriors), surest(shown)]
    sections = [_answering(found, shown), _classes(shown, name, classes)]
    return Page(title, said, tables, [*_curves(found), *more], name, least, most, facts, head or {}, sections)


def curves_of(panels: Sequence[Panel]) -> list[Curve]:
    """The figures that a task has of the scores of a plain network and of SBN, see `stochbn.tasks.Task.panels`."""
    colors = {"plain": line_of("plain", False).color, "SBN": line_of("plain", True).color}
    drawn = []
    for number, one in enumerate(panels):
        figure, axes = curves.panel()
        one.draw(axes, colors)
        drawn.append(Curve(one.title, one.caption, inline(figure, f"task{number}")))
    return drawn


def _answering(found: Sequence[Method], shown: Method) -> Section:
    """When to answer, and when to ask somebody."""
    note = (
        "Choose the share of wrong answers that you can live with, and answer examples whose entropy, a column of "
        "'stochbn predict', is no higher than in that row; give the others to somebody. The intervals are exact "
        "(Clopper and Pearson), for data like this. AURC is the mean share of wrong answers over all shares of answers."
    )
    return Section("answering", "When to answer", note, [answering_table(shown), compared_table(found)])


def _classes(shown: Method, name: str, classes: Sequence[str]) -> Section:
    """Which classes are taken for which."""
    count = shown.known.shape[1]
    names = list(classes) if len(classes) == count else list(map(str, range(count)))
    counts = confusions(shown.known, shown.labels)
    most = confusion_table(counts, names)
    tables = [class_table(shown.known, shown.labels, names), *([most] if most is not None and count > 2 else [])]
    matrix = matrix_of(counts, names)
    note = f"Of the most probable classes by {name}."
    if matrix is not None:
        note += " In the matrix a row has the examples of a class, and a column those that are taken for one."
    return Section("classes", "Classes", note, tables, matrix)


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
            "Reliability: on the dotted line, of the examples that get a probability of 80 % four fifths are right; "
            "below it the method is too sure. Bars are 95 % intervals, long where there are few examples.",
            curves.reliability(sure),
        ),
        (
            "Is it wrong where it is unsure?",
            "Selective prediction: how many answers are wrong if only the most certain ones are given. A curve that "
            "stays low for longer is better; at 100 % all examples are answered.",
            curves.risk_coverage(uncertain),
        ),
        (
            "How unsure is it of known and of unknown examples?" if unknown else "How unsure is it?",
            "Entropy of the predictive distribution: the share of examples at or below each value. "
            + (
                "AUROC: of a known and an unknown example, how often the unknown one's is higher; 0.5 is chance."
                if unknown
                else "Curves that rise early are of certain predictions."
            ),
            curves.entropies(known, unknown, classes=classes),
        ),
    ]
    if len(unknown) < sum(m.unknown is not None for m in found):
        every = {_key(m): entropy(m.unknown) for m in found if m.unknown is not None}
        caption = "The same of every method: solid or dashed of unknown examples, dotted of known ones."
        both = curves.entropies({_key(m): entropy(m.known) for m in found}, every, classes=classes)
        shown.append(("How do methods compare on unknown examples?", caption, both))
    return [Curve(title, caption, inline(figure, f"f{i}")) for i, (title, caption, figure) in enumerate(shown)]


def _key(method: Method) -> tuple[str, bool]:
    return method.name, method.sbn
