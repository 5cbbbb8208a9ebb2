"""The old name of `stochbn.sources.named`, for one release."""

from stochbn.caller import warn
from stochbn.sources.named import *  # noqa: F403

warn("stochbn.paper.data is called stochbn.sources.named now; the old name goes with the next release")
