"""The page about the paper's claims: a verdict on each for every network, and what the verdicts are made of."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stochbn.files import check_folder, write_bytes
from stochbn.paper import claims, figures, report, runner
from stochbn.paper.claims import CENTRE, DEFAULTS, DROPOUT, ENSEMBLE, INPUT, JOINT, ONE, PLAIN, SBN
from stochbn.paper.storing import restore
from stochbn.report.tables import Table

__all__ = ["claim", "page"]

NAMES = {"lenet5": "LeNet-5", "vgg11": "VGG-11", "resnet18": "ResNet-18"}
KEPT = ("results.json", "results.md", "claims.json", "claims.md", "entropy-cdf.png", "statistics.png")
"""What is copied from a run's folder."""
TOLD = 2.0
"""A difference of more standard errors than this is significant."""
NOTHING = 0.002
"""An insignificant difference of at most so many nats counts as none."""
FITTING = 0.05
"""Kolmogorov-Smirnov distance up to which a distribution counts as fitting."""
HOLDS, OPPOSITE, NEITHER, OPEN = "holds", "opposite", "no difference", "open"


@dataclass(frozen=True)
class Claim:
    """One claim: that a method's score is lower or higher than another's, or not worse.

    Attributes:
        words: the claim.
        key: of the score.
        pair: the method and what it is compared with.
        sign: the direction that is claimed: 1 higher, -1 lower; what only must not be worse is doubled: 2, -2.
        groups: of which predictors: `ONE`, `ENSEMBLE`, `DROPOUT`.
    """

    words: str
    key: str
    pair: tuple[str, str]
    sign: int
    groups: Sequence[str] = (ONE, ENSEMBLE, DROPOUT)


CLAIMS = (
    Claim("SBN lowers the NLL", "nll", (SBN, PLAIN), -1),
    Claim("Its noise does (from the medians, published as no SBN)", "nll", (SBN, CENTRE), -1),
    Claim("The other centre of the statistics does (medians, no noise)", "nll", (CENTRE, PLAIN), -1),
    Claim("SBN lowers the NLL beyond what a temperature does", "calibrated_nll", (SBN, PLAIN), -1),
    Claim("The error does not suffer (points)", "error", (SBN, PLAIN), -2),
    Claim("Unknown examples get more entropy (nats)", "entropy_unknown", (SBN, PLAIN), 1),
    Claim("Entropy tells unknown from known examples better (AUROC)", "auroc", (SBN, PLAIN), 1),
    Claim("Ours: the joint posterior has a lower NLL than the paper's", "nll", (JOINT, SBN), -1, (ONE, ENSEMBLE)),
    Claim("Ours: so it has after the best temperature", "calibrated_nll", (JOINT, SBN), -1, (ONE, ENSEMBLE)),
    Claim("Ours: the defaults, which stop early, have no higher NLL", "nll", (DEFAULTS, JOINT), -2, (ONE, ENSEMBLE)),
    Claim("Ours: draws over the input lower the NLL more than SBN", "nll", (INPUT, SBN), -1, (ONE, ENSEMBLE)),
    Claim("Ours: so they do after the best temperature", "calibrated_nll", (INPUT, SBN), -1, (ONE, ENSEMBLE)),
    Claim("Ours: they tell unknown examples better (AUROC)", "auroc", (INPUT, PLAIN), 1, (ONE, ENSEMBLE)),
)
ABOUT = f"""\
# The paper's claims, network by network

    stochbn paper claims results/trained/* --out results

makes every number of this page again from the [committed networks](trained/README.md), without training. It fits
posteriors, predicts and scores. SBN is the paper's factorised posterior, fitted as published, with 50 draws. The other
methods are the library's. "Joint" is its default posterior with 50 draws. "Joint, defaults" is the same with the
default `tolerance`: sampling stops when mean probabilities are about as accurate as those of 50 independent draws.
Draws over the input change the image as training did, or shift it by a pixel if training changed nothing, in
{claims.INPUTS} passes without noise in the statistics. Nothing is chosen on test data, except the temperature of the
calibrated NLL, by cross-validation.

SBN and "joint" do not differ in their form alone. "Joint" is centred on the running statistics, SBN on those of
mini-batches. On LeNet-5, SBN draws the statistics of the convolutions, as published, and "joint" those of all layers.

Each cell has a verdict and a difference with its standard error, paired over the test images. For one network, both
are means over the networks. A claim **holds** if the difference is more than two standard errors in the claimed
direction, and is **opposite** if it is more than two in the other direction. A claim that something gets no worse holds
unless it gets worse by more than two. In all other cases there is **no difference**, but a claim about the NLL stays
**open** if the difference is more than {NOTHING} nats.
"""
AFTER = """\
- **Where noise of the statistics helps, it corrects how sure a network is.** After the best temperature little of the
  difference is left, and the error stays as it is.
- The factorised form leaves out that the statistics of a mini-batch move together. The joint form keeps that, and has
  more noise for the same mini-batches.
- Sampling that stops early makes few draws where they agree. A few confident errors make much of the NLL of an
  overconfident network, and probably their draws agree at first.
- Unknown examples get more entropy, and so do known ones. The paper shows curves of unknown ones alone.
"""


def verdict(change: float, error: float, sign: int, *, nats: bool) -> str:
    """The verdict on a claim of a difference, in the words of the page.

    Args:
        change: the difference.
        error: its standard error.
        sign: as in `Claim`.
        nats: whether it is a difference of NLLs, which leaves the claim open if it is insignificant and large.

    >>> verdict(-0.03, 0.01, -1, nats=True), verdict(-0.01, 0.01, -1, nats=True), verdict(0.01, 0.01, -2, nats=False)
    ('holds', 'open', 'holds')
    """
    along = math.copysign(1, sign) * change
    if along < -TOLD * error:
        return OPPOSITE
    if along > TOLD * error or abs(sign) == 2:
        return HOLDS
    return OPEN if nats and abs(change) > NOTHING else NEITHER


def claim(folder: Path, run: Path, out: Path, *, jobs: int, progress: Callable[..., Any]) -> None:
    """Make all numbers about the stored networks of a run, and keep them in a folder ``NETWORK-paper``.

    What was stopped continues where it was.

    Args:
        folder: stored networks, as `stochbn.paper.storing.store` wrote them.
        run: the run folder to work in; it is made.
        out: the folder of results, with ``NETWORK-paper`` in it.
        jobs: networks side by side.
        progress: called with a name, a stage, and how much of how much is done.

    Raises:
        FileNotFoundError, ValueError: networks are missing or damaged, or the run folder is of others.
        ProcessError: a process failed.
        OSError: a folder cannot be written.
    """
    recipe = restore(folder, run)
    home = out / f"{recipe.network}-paper"
    check_folder(home, *KEPT)
    runner.run(recipe, run, jobs=jobs, keep_draws=False, progress=progress)
    claims.predict(run, jobs=jobs, progress=lambda done, total: progress("claims", "predict", done, total))
    report.write_run(run)
    claims.tabulate(run)
    home.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (run / name).exists():
            shutil.copyfile(run / name, home / name)


def page(out: Path) -> Table:
    """Write ``claims.md`` and ``claims.png`` into a folder of results, from all ``NETWORK-paper`` in it.

    Raises:
        FileNotFoundError: there are none.
        OSError: the folder cannot be written.
    """
    files = [file for name in NAMES if (file := out / f"{name}-paper" / "claims.json").exists()]
    if not files:
        raise FileNotFoundError(f"{str(out)!r} has no results of claims: {', '.join(NAMES)}-paper/claims.json")
    found = {file.parent.name.removesuffix("-paper"): json.loads(file.read_text()) for file in files}
    fits = {name: json.loads((out / f"{name}-paper" / "results.json").read_text()) for name in found}
    body = [_row(one, group, found) for one in CLAIMS for group in one.groups]
    body += [_exact(found), _marginals(found, fits)]
    table = Table(
        "Verdicts", ["claim", "of", *(NAMES[name] for name in found), "in short"], [row for row in body if row]
    )
    texts = [ABOUT, *(_described(NAMES[name], about) for name, about in found.items()), table.markdown(), AFTER]
    texts += ["![What draws change in the NLL](claims.png)", "## Every method, and what it costs"]
    texts += [claims.table(about).markdown() for about in found.values()]
    write_bytes(out / "claims.md", "\n\n".join(text.strip() for text in texts).encode() + b"\n")
    figures.save_changes(out / "claims", {NAMES[name]: about["changes"] for name, about in found.items()})
    return table


def _described(name: str, about: Mapping[str, Any]) -> str:
    recipe = about["recipe"]
    ece = 100 * about["scores"][ONE][PLAIN]["ece"]
    parts = [
        f"width {recipe['arguments'].get('width', 1):g}", f"{recipe['epochs']} epochs",
        f"{recipe['members']} networks{' and one with dropout' if recipe['dropout'] else ''}",
        f"{recipe['data']} less {recipe['held_out']:g} of the training images",
        f"{about['images']:,} test images and those of {recipe['unknown']}", f"plain ECE {ece:.2f} %",
    ]  # fmt: skip
    return f"**{name}**: {', '.join(parts)}."


def _groups(about: Mapping[str, Any], group: str) -> str:
    """The name of a group in a run: of the largest ensemble, where ensembles are asked for."""
    names: list[str] = [name for name in about["changes"] if name.startswith(group)]
    return names[-1] if names else group


def _row(claim: Claim, group: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A claim of one network, ensembles or networks with dropout; empty if no run has such."""
    cells, verdicts = [], []
    for about in found.values():
        change = about["changes"].get(_groups(about, group), {}).get(" - ".join(claim.pair), {})
        if f"{claim.key}_change" not in change:
            cells.append("-")
            verdicts.append("")
            continue
        value, error = change[f"{claim.key}_change"], change[f"{claim.key}_change_se"]
        verdicts.append(verdict(value, error, claim.sign, nats=claim.key.endswith("nll")))
        shown = claims.difference(change, claim.key, 2 if claim.key == "error" else 4)
        cells.append(f"{verdicts[-1]}: {shown}")
    of = "ensemble" if group == ENSEMBLE else group
    return [claim.words, of, *cells, _in_short(list(found), verdicts)] if any(verdicts) else []


def _in_short(networks: Sequence[str], verdicts: Sequence[str]) -> str:
    """One verdict if all are the same, otherwise where the claim holds."""
    made = {name: one for name, one in zip(networks, verdicts, strict=True) if one}
    if len(set(made.values())) == 1:
        return f"**{next(iter(made.values()))}**"
    held = [NAMES[name] for name, one in made.items() if one == HOLDS]
    return f"**holds** on {', '.join(held)} alone" if held else "**does not hold**"


def _exact(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    verdicts = [
        verdict(one["exact"]["kl_change"], one["exact"]["kl_change_se"], -2, nats=True) for one in found.values()
    ]
    cells = [f"{v}: {claims.difference(one['exact'], 'kl')}" for v, one in zip(verdicts, found.values(), strict=True)]
    words = "SBN is as near to exact inference, which draws all layers, as the joint posterior (KL, nats)"
    return [words, ONE, *cells, _in_short(list(found), verdicts)]


def _marginals(found: Mapping[str, Any], fits: Mapping[str, Any]) -> list[str]:
    both = {name: [one[part] for one in fits[name]["kolmogorov_smirnov"].values() for part in ("mean", "variance")]
            for name in found}  # fmt: skip
    verdicts = [HOLDS if max(each) < FITTING else OPPOSITE for each in both.values()]
    cells = [f"{v}: {min(e):.3f} to {max(e):.3f}" for v, e in zip(verdicts, both.values(), strict=True)]
    words = f"Normal and LogNormal fit the statistics of each layer (mean KS distance below {FITTING})"
    return [words, ONE, *cells, _in_short(list(found), verdicts)]
