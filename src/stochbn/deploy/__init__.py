"""Putting a network and its posterior to work: in services, and on collections that outgrow a machine.

`Scorer` is a callable class for Ray Data's ``Dataset.map_batches``; it needs no Ray itself. `Limits` and `BodyLimit`
hold requests to a service to a size. `export` is `stochbn.export`: one file for services without this library.
"""

import stochbn.export as export
from stochbn.deploy.scorer import Scorer
from stochbn.deploy.service import BodyLimit, Limits

__all__ = ["BodyLimit", "Limits", "Scorer", "export"]
