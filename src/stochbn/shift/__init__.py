"""What to do when the data changes: sound the alarm, and adapt to unlabelled examples.

`stochbn.fit` keeps a `stochbn.posteriors.reference.Reference` of training examples in the posterior. `Monitor` compares
mini-batches with it, and `adapt` moves the posterior's centre by the difference in their look::

    monitor = stochbn.shift.Monitor(posterior)
    if monitor.update(model, batch).alarm:
        posterior = stochbn.adapt(model, posterior, recent_batches)
        monitor.reset()
"""

from stochbn.shift.adapting import Adapter, adapt
from stochbn.shift.comparing import Reading
from stochbn.shift.monitor import Monitor

__all__ = ["Adapter", "Monitor", "Reading", "adapt"]
