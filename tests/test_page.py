from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import normal, seeded
from stochbn.evaluation.methods import Method, methods, score
from stochbn.paper import report
from stochbn.paper.figures import training
from stochbn.paper.page import page_of_run
from stochbn.paper.schedule import Epoch
from stochbn.predictions import entropy
from stochbn.report.facts import facts
from stochbn.report.objects import Source, extremes, source_of
from stochbn.report.page import Curve, Page, page_of, write_page
from stochbn.report.results import tabulate
from stochbn.report.style import inline
from stochbn.sources.named import Images

NASTY = "<script>alert('x')</script>", 'a "quoted" & <b>bold</b> class', "$x_1$", "\N{SNOWMAN}"
WIDTHS = 360, 800, 1600
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def member(seed: int, count: int = 60, classes: int = 4) -> dict[str, Tensor]:
    """What one network might predict: right more often than not."""
    labels = torch.arange(count) % classes
    found = {"labels": labels}
    for i, kind in enumerate(("plain", "sbn")):
        logits = normal(count, classes, seed=10 * seed + i) + 3 * torch.eye(classes)[labels] / (i + 1)
        found[f"{kind}.known"] = logits.log_softmax(1)
        found[f"{kind}.known.expected_entropy"] = entropy(logits.softmax(1)) * 0.75
        found[f"{kind}.unknown"] = normal(40, classes, seed=10 * seed + i + 5).log_softmax(1)
    return found


def pictures(count: int = 60, channels: int = 3) -> Images:
    pixels = torch.randint(0, 256, (count, channels, 20, 16), generator=seeded(3), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 4, NASTY, "pets")


def a_page(source: Source | None = None, classes: Sequence[str] = NASTY, name: str = "pets & <i>co</i>") -> Page:
    found = methods([member(0), member(1)], [member(2)])
    scores = score(found)
    logs = {"plain-0": [Epoch(i, 0.1, 1 / i, 1 - 0.5 / i, None, None) for i in range(1, 5)]}
    about: dict[str, Any] = {"networks": [name], "posteriors": [None], "data": name, "ood": "others", "augment": None}
    about |= {"draws": 50, "seed": 0}
    source = source or source_of(pictures())
    tables = tabulate(scores, name, "others")
    described = facts(about, 1.25, "stochbn evaluate --data 'pets & <i>co</i>'")
    more = [Curve("How were the networks trained?", "Loss.", inline(training(logs, stacked=True), "training"))]
    return page_of(f"network on {name}", found, scores, tables, (name, "others"), source, classes, described, more)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, a_page())
    return path


class Read(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ---------------------------------------------------------------- what is on the page


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    read = Read(written)
    for tag, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, f"{tag} {name}={value[:80]}"
    assert "@import" not in written.read_text()
    assert not re.search(r"url\((?!#)", written.read_text())


def test_names_from_data_are_shown_as_they_are_and_never_run(written: Path) -> None:
    read = Read(written)
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert not any(tag in ("b", "i") and "style" not in attributes for tag, attributes in read.tags)
    for name in NASTY:
        assert name in read.text
    assert "pets & <i>co</i>" in read.text


def test_identifiers_are_of_one_element_each_and_references_lead_to_one(written: Path) -> None:
    tags = Read(written).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    references = [attributes.get(key) or "" for _, attributes in tags for key in ("href", "xlink:href", "clip-path")]
    used = {match[1] for text in references if (match := re.search(r"#([^)]+)", text))}
    assert used <= set(names)


def test_the_summary_tells_what_changed_and_what_cannot_be_told(written: Path) -> None:
    text = " ".join(Read(written).text.split())
    assert "A single network classifies" in text
    assert "With SBN in a single network, the NLL is higher (+" in text
    assert "Answer the surest 80 %, of an entropy of at most" in text


def test_objects_come_with_pictures_classes_and_both_parts_of_the_entropy() -> None:
    page = a_page()
    assert len(page.least) == len(page.most) == 24
    entropies = [one.entropy for one in page.least]
    assert entropies == sorted(entropies, reverse=True)
    assert max(one.entropy for one in page.most) <= min(entropies)
    for one in page.least:
        assert one.picture is not None
        number = int(one.name.removeprefix("image "))
        image = Image.open(io.BytesIO(base64.b64decode(one.picture.split(",")[1])))
        assert image.size == (16, 20)
        assert torch.equal(torch.from_numpy(np.array(image)).movedim(-1, 0), pictures().pixels[number])
        assert one.label == NASTY[number % 4]
        assert len(one.top) == 3
        assert one.right == (one.top[0][0] == one.label)
        assert one.aleatoric is not None
        assert one.epistemic is not None
        assert one.aleatoric + one.epistemic == pytest.approx(one.entropy)


def test_what_is_no_image_is_a_table(tmp_path: Path) -> None:
    page = a_page(Source(lambda i: f"row {i}", lambda i: torch.zeros(5)))
    assert not page.has_pictures
    write_page(tmp_path / "p.html", page)
    read = Read(tmp_path / "p.html")
    assert "img" not in {tag for tag, _ in read.tags}
    assert page.least[0].name in read.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode_and_size_are_shown_or_left_out(mode: str) -> None:
    image = Image.new(mode, (400, 300)) if mode != "F" else Image.new("F", (4, 4))
    probs = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    (first, _), _ = extremes(probs, torch.tensor([0, 1]), None, Source(str, lambda i: image.copy()), ("a", "b"))
    assert first.aleatoric is None
    if mode == "F":
        assert first.picture is None
    else:
        assert first.picture is not None
        shown = Image.open(io.BytesIO(base64.b64decode(first.picture.split(",")[1])))
        assert shown.size == (160, 120)


def test_a_page_about_one_network_without_posterior_or_unknown_data(tmp_path: Path) -> None:
    alone = {key: value for key, value in member(0).items() if key.startswith("plain.known") or key == "labels"}
    found = methods([alone], [])
    scores = score(found)
    page = page_of("n", found, scores, [], ("d", None), Source(str, lambda i: None), (), {})
    assert "There was no posterior" in page.summary[1]
    write_page(tmp_path / "p.html", page)
    assert "figure-3" in (tmp_path / "p.html").read_text()
    assert "unknown" not in Read(tmp_path / "p.html").text.split("Least certain")[0]


def test_names_of_files_that_are_no_unicode_are_shown_escaped(tmp_path: Path) -> None:
    assert "row-\\udcff" in _html(a_page(Source(lambda i: "row-\udcff", lambda i: None)), tmp_path)


def test_dense_predictions_are_scored_and_have_no_page() -> None:
    labels = torch.arange(6)[:, None, None].expand(6, 4, 4) % 3
    method = Method("plain", False, 1, normal(6, 3, 4, 4).softmax(1), labels)
    scores = score([method])
    assert "error_se" not in scores[0]
    with pytest.raises(ValueError, match=r"one prediction for each example, got probabilities \[6, 3, 4, 4\]"):
        page_of("n", [method], scores, [], ("d", None), Source(str, lambda i: None), (), {})


def test_a_run_whose_data_is_gone_has_a_page_without_pictures(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "results" / "demo-digits"
    about, found = report.read_run(folder)
    about["data"]["known"]["sha256"] = "of other data"
    page = page_of_run(folder, about, found, score(found), [], {})
    assert not page.has_pictures
    assert "parts were not stored" in _html(page, tmp_path)


def _html(page: Page, folder: Path) -> str:
    write_page(folder / "page.html", page)
    return (folder / "page.html").read_text()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Any]:
    page = browser.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or page.complaints.append(request.url)
    )
    page.goto(written.as_uri())
    yield page
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_screens_of_any_width_and_has_its_pictures_and_figures(opened: Any, width: int) -> None:
    for scheme in ("light", "dark"):
        opened.set_viewport_size({"width": width, "height": 800})
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        too_wide = "e => !e.closest('.scroll, .skip, svg') && e.getBoundingClientRect().right > innerWidth + 1"
        assert opened.evaluate(f"[...document.querySelectorAll('main *')].filter({too_wide}).length") == 0
        loaded = opened.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert loaded == [True] * 48
        drawn = opened.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
        )
        assert len(drawn) == 5
        assert min(drawn) > 150
        back, ink = (
            opened.evaluate(f"getComputedStyle(document.documentElement).{key}") for key in ("backgroundColor", "color")
        )
        light, dark = (sum(map(int, re.findall(r"\d+", color))) for color in (back, ink))
        assert (light > dark) == (scheme == "light")


def test_tables_sort_by_the_mouse_and_by_the_keyboard(opened: Any) -> None:
    def cells(column: int) -> list[str]:
        found: list[str] = opened.evaluate(
            f"[...document.querySelectorAll('table')[1].tBodies[0].rows].map(r => r.cells[{column}].textContent)"
        )
        return found

    before = cells(3)
    numbers = sorted(before, key=lambda text: float(text.split(" ")[0]))
    heading = opened.locator("table").nth(1).locator("thead th").nth(3)
    heading.locator("button").click()
    assert cells(3) == numbers != before
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").focus()
    opened.keyboard.press("Enter")
    assert cells(3) == numbers[::-1]
    assert heading.get_attribute("aria-sort") == "descending"
    first = opened.locator("table").nth(1).locator("thead th").nth(0)
    first.locator("button").click()
    assert cells(0) == sorted(before_names := cells(0), key=str.lower)
    assert heading.get_attribute("aria-sort") is None
    assert len(before_names) == 6


def test_everything_that_can_be_seen_has_a_name_for_those_who_hear_it(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.lang") == "en"
    assert opened.locator("h1").count() == 1
    assert all(opened.evaluate("[...document.images].map(i => i.alt)"))
    for role in ("table", "region", "figure"):
        names = [element.get_attribute("aria-label") or element.get_attribute("aria-labelledby")
                 for element in opened.get_by_role(role).all()]  # fmt: skip
        assert names
        assert all(names)


def test_the_page_prints_in_light_colours_whatever_the_screen_has(opened: Any) -> None:
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.locator("nav").is_hidden()


# ---------------------------------------------------------------- installing


def test_every_file_that_is_no_module_is_installed() -> None:
    toml = pytest.importorskip("tomllib")
    root = Path(__file__).parent.parent
    named = toml.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {path for package, patterns in named.items() for pattern in patterns
                 for path in (root / "src" / package.replace(".", "/")).glob(pattern)}  # fmt: skip
    files = {
        path for path in (root / "src" / "stochbn").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert files == installed
