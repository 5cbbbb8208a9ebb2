"""Networks of other libraries, as far as these are installed. `make test-networks` and `make interop` run these."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_check import Case, Row, check

MODULES = {
    "transformers_cases": ["transformers"],
    "other_cases": ["pytorchcv", "monai", "torch_geometric", "pytorch_tabnet"],
    "torchvision_cases": ["torchvision", "timm", "segmentation_models_pytorch"],
}
VERSIONS = ("torch", "transformers", "pytorchcv", "monai", "torch_geometric", "pytorch_tabnet", "torchvision", "timm",
            "segmentation_models_pytorch")  # fmt: skip
OUT = os.environ.get("STOCHBN_NETWORKS_OUT")
"""A file for the results, as `benchmarks/networks.py` makes the table of."""


def cases() -> Iterator[Case]:
    for module, libraries in MODULES.items():
        if all(importlib.util.find_spec(library) for library in libraries):
            yield from importlib.import_module(module).CASES


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    made: list[Row] = []
    yield made
    if OUT:
        found = {name: importlib.metadata.version(name) for name in VERSIONS if importlib.util.find_spec(name)}
        about = {"machine": platform.machine(), "versions": found, "rows": [row.as_dict() for row in made]}
        Path(OUT).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT).write_text(json.dumps(about, indent=1) + "\n")


@pytest.mark.networks
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases()])
def test_a_network_of_another_library(case: Case, rows: list[Any]) -> None:
    torch.set_num_threads(1)
    row = check(case)
    rows.append(row)
    assert row.right, row.error
