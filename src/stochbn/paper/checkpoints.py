"""The old name of `stochbn.sources.checkpoints`, for one release."""

from stochbn.caller import warn
from stochbn.sources.checkpoints import *  # noqa: F403

warn("stochbn.paper.checkpoints is called stochbn.sources.checkpoints now; the old name goes with the next release")
