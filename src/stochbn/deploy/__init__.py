"""Putting a network and its posterior to work: in services, and on collections that outgrow a machine.

`Scorer` is a callable class for Ray Data's ``Dataset.map_batches``; it needs no Ray itself. `export` is
`stochbn.export`: one file for services without this library.
"""

import stochbn.export as export
from stochbn.deploy.scorer import Scorer

__all__ = ["Scorer", "export"]
