"""Equally weighted mixtures of predictives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.network.calling import Batch
from stochbn.predictive.predictive import Predictor

__all__ = ["Ensemble"]


class Ensemble:
    """Equally weighted mixture of several predictives, such as a Deep Ensemble (Lakshminarayanan et al., 2017).

    Members can be any predictives of the same task: ``Predictive(model)`` for plain networks, or with a posterior for
    the paper's "Deep Ensembles + SBN". Entropy, mutual information and variance are those of the mixture over the draws
    of all members.

    Args:
        members: one predictive or more, with the same classes.

    Raises:
        ValueError: there are no members.
        TypeError: a member is not a predictive.
    """

    def __init__(self, members: Sequence[Predictor]) -> None:
        self.members = list(members)
        if not self.members:
            raise ValueError("an ensemble needs at least one member, got none")
        for member in self.members:
            if not callable(member) or isinstance(member, nn.Module):
                raise TypeError(
                    f"expected predictives as members, got {type(member).__name__}; "
                    "wrap a plain network as stochbn.Predictive(network)"
                )

    def __call__(self, x: Batch, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Any:
        """Predict a batch with every member; arguments as for `Predictive`.

        With `keep_draws`, the draws of the members follow each other.

        Raises:
            ValueError: the members predict different numbers of classes, or are of different tasks.
        """
        mixture: Any = None
        kept: list[Tensor] = []
        for count, member in enumerate(self.members, start=1):
            prediction = member(x, generator=generator, keep_draws=keep_draws)
            if prediction.draws_kept is not None:
                kept.append(prediction.draws_kept)
            if mixture is None:
                mixture = prediction.of(prediction.averages, None)
                continue
            if type(prediction) is not type(mixture):
                raise ValueError(f"member {count} is of another task than those before it")
            shapes = [list(p.averages[0].shape) for p in (prediction, mixture)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"member {count} predicts {shapes[0]}, those before it {shapes[1]}; "
                    "all members of an ensemble must predict the same classes"
                )
            mixture = mixture.mixed(prediction, 1 / count)
        return mixture.of(mixture.averages, torch.cat(kept) if len(kept) == len(self.members) else None)
