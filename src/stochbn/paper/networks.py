"""The old name of `stochbn.sources.architectures`, for one release."""

from stochbn.caller import warn
from stochbn.sources.architectures import *  # noqa: F403

warn("stochbn.paper.networks is called stochbn.sources.architectures now; the old name goes with the next release")
