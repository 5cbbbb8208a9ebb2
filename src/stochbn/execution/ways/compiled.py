"""Compile the network with ``torch.compile``, with drawn statistics and the number of examples as inputs of the code.

Applies to: calls with ``compile=True``, of networks whose examples are proven not to affect each other. Error:
rounding, because sums may be taken in another order. Compiling takes 5 to 100 seconds for each kind of input, before
the first pass. ``torch.compile`` checks the network's Python state before every pass, and compiles again if it has
changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stochbn.caller import warn

__all__ = ["LEAST", "Compiled", "applies"]

LEAST = 2
"""Smaller batches are padded to this size: a single example would need code of its own."""


def applies(asked: bool, cpu: bool) -> str:
    """The reason not to use this way; empty if there is none."""
    if not asked:
        return "it is for long jobs, with compile=True"
    # On a CPU, torch.compile needs a C++ compiler, and says so when it is called.
    return "" if cpu or torch.cuda.is_available() else "it is for CPUs and CUDA"


class Compiled:
    """Calls a network by its compiled code, or without it once it has failed.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        before = set(vars(model))
        self._compiled = torch.compile(model)
        for name in vars(model).keys() - before:  # notes of PyTorch, and of Lightning, which would count as a change
            del vars(model)[name]
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        if self.failed:
            return self._model(*args, **kwargs)
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.ndim:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            self.failed = True
            output = self._model(*args, **kwargs)  # which raises what is the network's own error
            reason = str(error).strip().partition("\n")[0]
            warn(f"torch.compile failed ({type(error).__name__}: {reason:.200}), so passes are made without it")
            return output
