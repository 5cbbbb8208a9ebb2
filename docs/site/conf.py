"""Sphinx's settings: the site is made of the repository's own pages, so their links hold in both."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import stochbn

ROOT = Path(__file__).parent.parent.parent

project = "stochbn"
copyright = "the stochbn authors, Apache-2.0"
release = stochbn.__version__
root_doc = "docs/index"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
include_patterns = [
    "docs/*.md", "docs/howto/*.md", "docs/gallery/**", "results/**/*.md", "results/*.md", "benchmarks/*.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
]  # fmt: skip
exclude_patterns = ["docs/gallery/**/*.ipynb", "docs/gallery/**/*.py", "docs/gallery/**/*.json"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
suppress_warnings = [
    "myst.xref_missing",  # links to files of the repository that are no pages, which tests/test_documents.py checks
    "toc.not_included",  # tables of single runs, which the pages about them link to
    "config.cache",
]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
add_module_names = False
html_theme = "furo"
html_title = "stochbn"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_extra_path = [str(Path(__file__).parent / "extra")]
html_theme_options = {"source_edit_link": "", "top_of_page_buttons": []}
html_show_sphinx = False
sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "docs" / "pictures")],
    "gallery_dirs": [str(ROOT / "docs" / "gallery")],
    "filename_pattern": r"plot_",
    "ignore_pattern": r"digits\.py|__init__",
    "copyfile_regex": r"digits\.py",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "capture_repr": (),
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib",),
}


def setup(app: Sphinx) -> None:
    """Show the one signature that `fit` has; its overloads, one for each kind, are for type checkers."""
    analyzer = ModuleAnalyzer.for_module("stochbn.fitting")
    analyzer.analyze()
    analyzer.overloads.clear()
