"""Keeping some of the examples of a fit, and making the reference of them that new data is compared with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator

import safetensors.torch
import torch
from torch import Tensor

from stochbn.distributed import Ranks
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.posteriors.reference import Reference
from stochbn.shift.estimate import make_reference
from stochbn.shift.looking import looking
from stochbn.shift.mixes import mixes_of
from stochbn.tasks import Embedding, Task, named
from stochbn.undisturbed import undisturbed

__all__ = ["Keeper"]

EXAMPLES = 2048
"""Examples that a reference is made from, at most."""
LEAST = 256
"""Examples that it needs."""
INPUT_BYTES = 2**28
"""What their inputs may take, at most."""
ROW_BYTES = 2**29
"""What their rows may take, at most."""
BATCH = 256


class Keeper:
    """Keeps the first examples that a fit observes, on rank 0.

    Args:
        channels: D, of all batch norms together.
        ranks: those that fit together.
    """

    def __init__(self, channels: int, ranks: Ranks) -> None:
        self._most = min(EXAMPLES, ROW_BYTES // (8 * channels)) if ranks.rank == 0 else 0
        self._ranks = ranks
        self._inputs: list[NetworkInput] = []
        self._count = self._bytes = 0

    def watched(self, mini_batches: Iterable[NetworkInput]) -> Iterator[NetworkInput]:
        """The same mini-batches, which are kept while there is room."""
        for inputs in mini_batches:
            self._keep(inputs)
            yield inputs

    def read(self, mini_batches: Iterable[NetworkInput]) -> None:
        """Keep mini-batches until there is no more room."""
        for inputs in mini_batches:
            if not self._keep(inputs):
                return

    def _keep(self, inputs: NetworkInput) -> bool:
        size = sum(tensor.nbytes for tensor in inputs.tensors())
        room = self._count < self._most and self._bytes + size <= INPUT_BYTES
        if room and inputs.divisible:
            self._inputs.append(inputs.map(lambda tensor: tensor.detach().clone()))
            self._count += len(inputs)
            self._bytes += size
        return room

    def reference(self, network: Network, task: Task, layers: Collection[str], asked: bool) -> Reference | None:
        """The reference, the same on all ranks; None where there are too few examples, or no layer is usable.

        Passes are in evaluation mode, with the network's running statistics. Examples that give activations that are
        not finite are left out.

        Args:
            network: the network.
            task: what its output means; where it cannot read that, there is no mix, of which a warning tells if it
                was asked for.
            layers: names of the batch norms that the reference is of, as far as they are usable.
            asked: whether there has to be one.

        Raises:
            ValueError: there is none although it was asked for; the message says why.
        """
        made: Reference | None = None
        if self._ranks.rank == 0:
            made = self._made(network, task, layers, asked)
        if self._ranks.count == 1:
            return made
        about = json.loads(self._ranks.of_first(json.dumps(made and made.description()).encode()))
        tensors = {} if made is None else {name: values.contiguous() for name, values in made.tensors().items()}
        sent = safetensors.torch.load(self._ranks.of_first(safetensors.torch.save(tensors)))
        return None if about is None else Reference.from_file(sent, about)

    @undisturbed
    def _made(self, network: Network, task: Task, layers: Collection[str], asked: bool) -> Reference | None:
        rows: dict[str, list[Tensor]] = {}
        mixes: list[Tensor] = []
        unread = "" if named(task) else f"{type(task).__name__} is no task of stochbn's own, which a file could name"
        with looking(network) as look:
            for inputs in self._batches() if self._count >= LEAST else ():
                try:
                    found, output = look(inputs)
                except Exception:  # what a prediction would raise, which is not for a fit to tell
                    if asked:
                        raise
                    return None
                try:
                    mixes.append(mixes_of(task, output))
                except (TypeError, ValueError) as error:
                    unread = unread or str(error)
                for name, values in found.items():
                    rows.setdefault(name, []).append(values)
            kept = {name: values for name, values in rows.items() if name in layers and name not in look.unusable}
            joined = {name: torch.cat(values) for name, values in kept.items()}
            running = {name: look.running(name) for name in joined}
        count = self._count
        usable = {name: values for name, values in joined.items() if len(values) == count}
        widths = {mix.shape[1] for mix in mixes}
        mix = torch.cat(mixes) if len(widths) == 1 and not unread else torch.empty(count, 0, dtype=torch.float32)
        good = torch.stack([values.isfinite().all(1) for values in (*usable.values(), mix)]).all(0)
        if not usable or int(good.sum()) < LEAST:
            if asked:
                few = usable or count < LEAST
                why = f"there are {int(good.sum())} usable examples of {count}" if few else "no layer is usable"
                raise ValueError(
                    f"no reference can be made: {why}; it needs {LEAST} examples with finite activations, and a batch "
                    "norm that is called once in a pass"
                )
            return None
        if unread and asked:
            warnings.warn(f"new data is compared without the mix of classes: {unread}", stacklevel=2)
        running = {name: running[name] for name in usable}
        return make_reference(
            {name: values[good] for name, values in usable.items()},
            mix[good],
            task if named(task) else Embedding(),
            running,
        )

    def _batches(self) -> Iterator[NetworkInput]:
        """The examples in larger mini-batches, where they fit together."""
        group: NetworkInput | None = None
        for inputs in self._inputs:
            if group is not None and (len(group) >= BATCH or group.kind() != inputs.kind()):
                yield group
                group = None
            group = inputs if group is None else group.join(inputs)
        if group is not None:
            yield group
