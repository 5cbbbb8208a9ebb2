"""Putting a network and its posterior to work: in services, and on collections that outgrow a machine.

`Scorer` is a callable class for Ray Data's ``Dataset.map_batches``; it needs no Ray itself. `application` is a service
by FastAPI, and `Limits` and `BodyLimit` hold requests to a size and a time. `export` is `stochbn.export`: one file for
services without this library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import stochbn.export as export
from stochbn.deploy.scorer import Scorer
from stochbn.deploy.service import BodyLimit, Limits

if TYPE_CHECKING:
    from stochbn.deploy.web import application

__all__ = ["BodyLimit", "Limits", "Scorer", "application", "export"]


def __getattr__(name: str) -> Any:
    """`application`, which needs FastAPI, is imported where it is used."""
    if name != "application":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stochbn.deploy.web import application

    return application
