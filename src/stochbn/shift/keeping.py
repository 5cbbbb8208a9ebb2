"""Keeping some of the examples of a fit, and making the reference of them that new data is compared with."""

from __future__ import annotations

import json
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
from stochbn.shift.mixes import edges_of, mixes_of
from stochbn.tasks import Task
from stochbn.undisturbed import undisturbed

__all__ = ["Keeper"]

EXAMPLES = 2048
"""Examples that a reference is made from, at most."""
LEAST = 64
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

    def reference(self, network: Network, task: Task, layers: Collection[str]) -> Reference | None:
        """The reference, the same on all ranks; None where there are too few examples, or no layer is usable.

        Passes are in evaluation mode, with the network's running statistics.

        Args:
            network: the network.
            task: what its output means; where it cannot read that, there is no mix.
            layers: names of the batch norms that the reference is of, as far as they are usable.
        """
        made = self._made(network, task, layers) if self._count >= LEAST else None
        if self._ranks.count == 1:
            return made
        return _unpacked(self._ranks.of_first(b"" if made is None else _packed(made)))

    @undisturbed
    def _made(self, network: Network, task: Task, layers: Collection[str]) -> Reference | None:
        rows: dict[str, list[Tensor]] = {}
        mixes: list[Tensor] = []
        edges: Tensor | None = None
        with looking(network) as look:
            for inputs in self._batches():
                try:
                    found, output = look(inputs)
                except Exception:  # what a prediction would raise, which is not for a fit to tell
                    return None
                try:
                    edges = edges_of(task, output) if edges is None else edges
                    mixes.append(mixes_of(task, output, edges))
                except (TypeError, ValueError):  # an output that the task cannot read
                    mixes.append(torch.empty(len(inputs), 0))
                for name, values in found.items():
                    rows.setdefault(name, []).append(values)
            kept = {name: values for name, values in rows.items() if name in layers and name not in look.unusable}
        joined = {name: torch.cat(values) for name, values in kept.items()}
        usable = {name: values for name, values in joined.items() if len(values) == self._count}
        usable = {name: values for name, values in usable.items() if bool(values.isfinite().all())}
        widths = {mix.shape[1] for mix in mixes}
        mix = torch.cat(mixes) if len(widths) == 1 else torch.empty(self._count, 0)
        if not usable:
            return None
        if not mix.isfinite().all():
            mix = mix[:, :0]
        return make_reference(usable, mix, torch.empty(0, 9) if edges is None else edges, task)

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


def _packed(reference: Reference) -> bytes:
    about = {"about": json.dumps(reference.description())}
    return safetensors.torch.save({name: t.contiguous() for name, t in reference.tensors().items()}, about)


def _unpacked(data: bytes) -> Reference | None:
    if not data:
        return None
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["about"])
    return Reference.from_file(safetensors.torch.load(data), about)
