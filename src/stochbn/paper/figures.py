"""The paper's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stochbn.files import write
from stochbn.metrics import entropy_cdf

__all__ = ["save_entropy_cdf"]

COLORS = {"SBN": "#d62728", "Deep Ensembles": "#1f77b4", "Dropout": "#2ca02c"}


def save_entropy_cdf(
    path: Path, entropies: Mapping[tuple[str, bool], Tensor], *, classes: int, title: str
) -> list[Path]:
    """Draw the empirical distribution functions of entropies as the paper's figure does: PNG and SVG.

    The curves are SBN, Dropout and Deep Ensembles, the latter two solid without and dashed with SBN. The single
    network without SBN is left out, as in the paper.

    Args:
        path: where to, without an ending.
        entropies: ``[N]``, nats, for each method's name and whether it draws the statistics.
        classes: the number of classes K: entropies end at ln K.
        title: the figure's title.

    Returns:
        The files written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for (method, sbn), values in entropies.items():
        if method == "SBN" and not sbn:
            continue
        x, y = entropy_cdf(values)
        label, style = (f"{method} + SBN", "--") if sbn and method != "SBN" else (method, "-")
        axes.step([0, *x.tolist()], [0, *y.tolist()], where="post", label=label, ls=style, color=COLORS[method], lw=1.8)
    limit = math.log(classes)
    axes.set(xlim=(0, limit), ylim=(0, 1), xlabel="entropy of the predictive distribution (nats)")
    axes.set(ylabel="fraction of unknown objects at or below", title=title)
    axes.title.set_fontsize(10)
    ticks = [tick for tick in axes.get_xticks() if tick < 0.93 * limit]
    axes.set_xticks([*ticks, limit], [*(f"{tick:.2g}" for tick in ticks), f"ln {classes}"])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9, title="lower and further right is better", title_fontsize=8)
    files = [path.with_name(path.name + ending) for ending in (".png", ".svg")]
    with mpl.rc_context({"svg.hashsalt": "stochbn"}):  # the same figure is the same file
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            write(file, lambda temporary, metadata=metadata: figure.savefig(temporary, dpi=160, metadata=metadata))  # type: ignore[misc]
    return files
