"""Make docs/networks.md of what the suites of other libraries' networks found: ``python benchmarks/networks.py``.

The suites write their results where STOCHBN_NETWORKS_OUT says: ``make networks`` runs the one of the main environment
and this command. Costs are of one thread, the other cores being used or not: they say how much, not how much exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stochbn.files import write_bytes
from stochbn.report.tables import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "networks"
TEXT = """# Networks of other libraries

Look here whether networks like yours were tried, how many passes a call costs, and which faster executions apply.

Each network is randomly initialised and makes {warm_up} passes in training mode. Then a joint posterior is fitted to 6
mini-batches of 8. These are the checks:

- the network is bit-identical afterwards;
- predictions with `tolerance=0` equal those of a slow loop over copies;
- predictions with the defaults are within 6 standard errors of 24 independent draws.

The columns "first call" and "later" have the costs of calls with the defaults, in plain passes of the same examples.
These are so few and small that Python takes most of the time. `make networks` and `make interop` run the checks and
make this page.

**{right} of {total} networks pass.**
"""


def document() -> str:
    """The page, of all results there are."""
    parts = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows: list[dict[str, Any]] = [row for part in parts for row in part["rows"]]
    text = TEXT.format(warm_up=30, right=sum(row["right"] for row in rows), total=len(rows))
    tables = []
    for part in parts:
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        body = [_cells(row) for row in part["rows"]]
        columns = ["network", "library", "batch norms", "first call", "later", "ways, or why examples stay together"]
        tables.append(Table(f"{versions}; {part['machine']}, one thread", columns, body).markdown())
    return "\n\n".join([text.strip(), *tables]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    costs = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("first", "later")]
    note = row["ways"]
    if row["error"]:
        note = f"{'refused' if row['right'] else 'WRONG'}: {row['error'][:160]}"
    return [row["name"], row["library"].replace("_", " "), str(row["layers"]), *costs, note]


if __name__ == "__main__":
    write_bytes(ROOT / "docs" / "networks.md", document().encode())
    print(document())
