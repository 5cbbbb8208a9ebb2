"""Monte Carlo dropout, alone or with batch-norm statistics drawn too."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stochbn.augment import Augment
from stochbn.caller import warn
from stochbn.execution import Call, Draw, Passes
from stochbn.execution.masks import Masks, dropping_modules
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.predictive.predictive import Predictive
from stochbn.tasks import Task
from stochbn.undisturbed import without_gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MCDropout"]


class MCDropout(Predictive):
    """Predictive distribution of a network with its dropout left on (Gal and Ghahramani, 2016).

    With a posterior, every pass also draws the batch-norm statistics: the paper's "Dropout + SBN". Dropout layers are
    in training mode, and so are modules that draw random numbers themselves, such as those that call ``F.dropout``. All
    other modules are in evaluation mode. The arguments are those of `Predictive`. Every example gets all draws, because
    masks are independent. The given generator, or PyTorch's global one, seeds the masks of each pass.

    Raises:
        ValueError: at the first call, if the network draws no random numbers in training mode.
    """

    @shows_options(Interface.of)
    def __init__(
        self,
        model: nn.Module,
        draws: int = 50,
        posterior: Posterior | None = None,
        *,
        generator: torch.Generator | None = None,
        keep_draws: bool = False,
        check: Literal["weights", "shape"] = "weights",
        augment: Augment | None = None,
        clean: bool = True,
        **interface: Unpack[InterfaceOptions],
    ) -> None:
        super().__init__(
            model,
            posterior,
            draws,
            generator=generator,
            keep_draws=keep_draws,
            tolerance=0,
            check=check,
            augment=augment,
            clean=clean,
            **Interface.of(model, **interface)._asdict(),
        )

    def _call(self, exact: bool, inputs: NetworkInput) -> Call:
        layers = self._dropping(inputs)
        whole = "masks depend on which examples are predicted together"
        return replace(super()._call(exact, inputs), training=layers, whole=whole, masks=None)

    def _dropping(self, inputs: NetworkInput) -> frozenset[str]:
        """The modules to put in training mode."""
        network, key = self._network, ("dropout", inputs.kind())
        dropping: frozenset[str] | None = network.known.get(key)
        if dropping is None:
            layers = {n for n, m in network.model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0}
            calling = dropping_modules(network, inputs)
            failed = isinstance(calling, Exception)
            if isinstance(calling, Exception):
                if not layers:
                    raise calling
                calling = set()
            others = frozenset(calling - layers)
            alike = not others or _reads_alike(network, inputs, self.task, others.union(layers))
            if alike is False:
                warn(
                    f"{_named(others)} of {type(network.model).__name__} call dropout themselves, but give something "
                    "else in training mode, so their dropout stays off; use torch.nn.Dropout layers there",
                )
            dropping = frozenset(layers | others) if alike else frozenset(layers)
            if not failed and alike is not None:  # it may work for other examples
                network.known.keep(key, dropping)
        if not dropping:
            raise ValueError(
                f"{type(network.model).__name__} has no dropout with a positive rate, so every pass would be the "
                "same; use Predictive for it, or a network trained with torch.nn.Dropout layers"
            )
        return dropping

    @property
    def _read_as(self) -> Task:
        """The task without fitted parts, which were fitted without dropout."""
        return self.task

    @property
    def _once(self) -> bool:
        """False: draws differ in their masks."""
        return False

    def _drawn(self, count: int, generator: torch.Generator | None) -> Generator[Draw, None, None]:
        device = generator.device if generator is not None else "cpu"
        seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
        drawn = super()._drawn(count, generator) if self.posterior is not None else ({} for _ in seeds)
        for seed, draw in zip(seeds, drawn, strict=True):
            yield _Masked(seed, draw)

    def _pass(self, made: Passes, block: Sequence[Draw]) -> Tensor:
        values = []
        for draw in block:
            assert isinstance(draw, _Masked)
            with Masks(draw.seed):
                values.append(made([draw]))
        return torch.cat(values)


class _Masked(dict[str, Tensor]):
    """Statistics of a pass, and the seed of its masks."""

    def __init__(self, seed: int, draw: Draw) -> None:
        super().__init__(draw)
        self.seed = seed


@without_gradients
def _reads_alike(network: Network, inputs: NetworkInput, task: Task, training: frozenset[str]) -> bool | None:
    """Whether the task's values have the same shape with these modules in training and in evaluation mode.

    None if a pass fails.
    """

    def shape(names: frozenset[str]) -> torch.Size:
        with network.copied() as replica, Masks(0):
            replica.modes(names)
            return task.raw(inputs.call(replica.model)).shape

    try:
        return shape(frozenset()) == shape(training)
    except Exception:
        return None


def _named(names: Collection[str]) -> str:
    shown = [repr(name) if name else "the network's own forward" for name in sorted(names)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
