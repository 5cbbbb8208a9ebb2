"""What the numbers of an evaluation depend on, what they cost, and how they were made."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

import stochbn

__all__ = ["facts", "made_with", "surroundings"]


def facts(
    about: Mapping[str, Any], seconds: float, command: str, data: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The facts of an evaluation, by their names.

    Args:
        about: its settings: ``networks``, ``posteriors`` (None, or ``kind``, ``batch_size`` and ``temperature``),
            ``data``, ``ood``, ``draws``, ``seed`` and ``augment``.
        seconds: what predicting took.
        command: how it is made again.
        data: more facts, about the data.
    """
    draws = about["draws"]
    noisy = any(described and described["batch_size"] != "inf" for described in about["posteriors"])
    drawn = f"{draws} with SBN" if noisy or about["augment"] else "one with SBN, whose posteriors have no noise"
    passes = f"An example takes one pass of a network as it is ({draws} if dropout stays on), and {drawn}."
    return {
        "Networks": ", ".join(about["networks"]),
        "Posteriors": "; ".join(map(_posterior, about["posteriors"])),
        "Known classes": about["data"],
        "Unknown classes": about["ood"] or "none",
        **(data or {}),
        "Augmentation": about["augment"] or "none",
        "Seed": str(about["seed"]),
        "Cost": f"Predicting took {seconds:.1f} s. {passes}",
        **made_with(surroundings()),
        "Command": command,
    }


def made_with(about: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Versions and machine, as `surroundings` gives them, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return {"Versions": versions, "Machine": f"{about['machine']['platform']}, {about['machine']['cores']} cores"}


def _posterior(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "none"
    size = described["batch_size"]
    names = {None: "noise of its mini-batches", "inf": "no noise"}
    noise = names.get(size, f"noise of mini-batches of {size}")
    return f"{described['kind']}, {noise}, temperature {described['temperature']:.3g}"


def surroundings() -> dict[str, dict[str, Any]]:
    """What a result was made with: ``versions`` and ``machine``."""
    versions = {"stochbn": stochbn.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "machine": {"platform": platform.platform(), "cores": os.cpu_count()}}
