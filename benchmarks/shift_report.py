"""The criteria and tables of `shift.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from shift_methods import METHODS

from stochbn.report.tables import Table

__all__ = ["Criterion", "alarm_scores", "criteria", "report"]

Criterion = tuple[str, str, bool | None]
"""What is asked for, what was measured, and whether it is met; None where there is nothing to measure."""

UNUSUAL = 0.01
ROUNDING = 1e-6
HARMLESS = {
    "two classes": "two classes alone",
    "one class": "one class alone",
    "long tail": "long tail",
    "two frequent classes": "two frequent classes",
    "mixed corruptions": "mixed corruptions",
    "batches of 8": "batches of 8",
    "sorted stream": "sorted stream",
}
"""Regimes in which adapting may raise the error by a point in the mean, and by three in the worst cell."""
ABOUT = f"""\
Methods are shown the unlabelled examples of a cell, and then predict other ones, whose labels score them. A regime
has several cells, which differ in the corruption, the classes or the random examples. Scores are means over cells; the
ECE is of all cells' predictions together. Changes are against the plain network on the same examples, with paired
standard errors over cells; "worst" is the largest change of the error in a cell. "Coverage" and "size" are of conformal
sets (`stochbn.conformal.lac`) for 90 %, with thresholds from clean held-out data. "Passes" are those over each example
that is adapted to, where a backward pass counts as two, and those over each example that is predicted. `adapt` takes 7
to 25 of the former where it moves anything, and 2 where it does not.

Corruptions are the fifteen of CIFAR-10-C with its constants, made by `shift_corruptions.py`. Frost has a procedural
texture, not the published photographs. On MNIST the same constants are used.

- **plain + temperature**: the temperature is chosen on held-out clean data.
- **prediction-time BN**: the statistics of the examples alone (Nado et al., 2020).
- **blend, N = 16**: those statistics and the source's, which count as 16 examples (Schneider et al., 2020).
- **Tent**: a yardstick that trains: 10 steps of Adam on the entropy (Wang et al., 2021).
- **SBN**: `stochbn.fit` on training data, without adapting; {METHODS["SBN"].predicting} draws.
- **adapt**: the centre that `stochbn.adapt` gives, without noise; "+ noise": with the source's noise.
- **adapt, no guard**: `adapt` on a posterior without a reference, which cannot tell classes from look.
- **ensemble of 3**: the mean probabilities of the three ResNet-18s, which differ in the seed of their training; "each
  adapted": of their adapted centres. Changes are against the first of them alone.

The ResNet-18 was trained with three seeds, which see the same examples. In the table of errors its column has means
over the three; the other tables have each. No network here was trained with dropout, so there are no rows of MC
dropout. All changes are made by corrupting or selecting test images; no data set that changed by itself was measured.

Slow methods (Tent, SBN, no guard, prior = 16) are measured in every third cell; on networks of which not all cells are
measured, at severity 5 alone. Their changes are paired with the same cells of the plain network. In a stream, methods
without a memory adapt to the last batch alone.

    STOCHBN_DATA=... python benchmarks/shift.py --threads 1
"""


def alarm_scores(found: dict[str, Any]) -> dict[str, float]:
    """The alarm in numbers.

    ``auroc`` is by the p-value, where ties are broken by the mean logarithm of the layers' distances, as p-values end
    at about 1 / 1025. ``auroc_distance`` is by that mean alone. Both are means over corruptions.
    """
    clean = [(-p, distance) for p, distance in found["clean"]]
    shifted = {name: [(-p, distance) for p, distance in rows] for name, rows in found["shifted"].items()}
    by_name = {name: _auroc(rows, clean) for name, rows in shifted.items()}
    alone = {name: _auroc([(d,) for _, d in rows], [(d,) for _, d in clean]) for name, rows in shifted.items()}
    delays = [delay for delay in found["delays"].values() if delay]
    return {
        "auroc": statistics.mean(by_name.values()),
        "auroc_worst": min(by_name.values()),
        "auroc_distance": statistics.mean(alone.values()),
        "false": 100 * statistics.mean(float(-p <= UNUSUAL) for p, _ in clean),
        "groups": len(clean),
        "power": 100 * statistics.mean(float(-p <= UNUSUAL) for rows in shifted.values() for p, _ in rows),
        "delay": statistics.mean(delays) if delays else math.nan,
        "never": len(found["delays"]) - len(delays),
        "monitor_false": found["false_alarms_of_monitor"],
    }


def _auroc(high: list[tuple[float, ...]], low: list[tuple[float, ...]]) -> float:
    return statistics.mean((a > b) + 0.5 * (a == b) for a in high for b in low)


def told_apart(network: dict[str, Any]) -> tuple[float, float]:
    """In % of cells: classes alone that are called a mix, and corruptions at severity 3 that are called a look."""
    kinds = network["regimes"]
    mixes = [one for kind in ("two classes", "one class") for one in kinds[kind]["adapt"]]
    looks = kinds["severity 3"]["adapt"]
    mix = [one["look"] > UNUSUAL and one["mixed"] <= UNUSUAL for one in mixes]
    look = [one["look"] <= UNUSUAL for one in looks]
    return 100 * sum(mix) / len(mix), 100 * sum(look) / len(look)


def criteria(network: dict[str, Any]) -> list[Criterion]:
    """What the design asks for, network by network."""
    return list(_criteria(network))


def _criteria(network: dict[str, Any]) -> Iterator[Criterion]:
    kinds = network["regimes"]
    five = kinds["severity 5"]["methods"]
    plain, adapt, other = five["plain"], five["adapt"], five["prediction-time BN"]
    ratio = _ratio(adapt["error"], plain["error"])
    yield (
        "severity 5: error at most 0.6 of plain",
        f"{adapt['error']:.1f} / {plain['error']:.1f} = {ratio:.2f}",
        ratio <= 0.6,
    )
    for one, noise in ((adapt, ""), (five["adapt + noise"], ", with noise")):
        ratio = _ratio(one["ece"], plain["ece"])
        words = f"{one['ece']:.1f} / {plain['ece']:.1f} = {ratio:.2f}"
        yield f"severity 5: ECE at most half of plain{noise}", words, ratio <= 0.5
        words = f"{one['nll']:.3f} against {other['nll']:.3f}"
        yield f"severity 5: NLL at most that of prediction-time BN{noise}", words, one["nll"] <= other["nll"]
    covered = [
        (one["coverage"], kind["methods"]["adapt"]["by_cell"][name]["coverage"])
        for key, kind in kinds.items()
        if key.startswith("severity")
        for name, one in kind["methods"]["plain"]["by_cell"].items()
    ]
    low = [pair for pair in covered if pair[0] < 70]
    if low:
        before, after = (statistics.mean(part) for part in zip(*low, strict=True))
        words = f"{before:.1f} to {after:.1f} % ({len(low)} cells)"
    yield (
        "all severities: coverage at least 85 % where plain has less than 70 %",
        words if low else "no such cells",
        after >= 85 if low else None,
    )
    clean = kinds["clean"]["methods"]["adapt"]
    words = f"{clean['error_change']:+.2f} points, {clean['nll_change']:+.4f} nats"
    yield (
        "clean: at most +0.5 points and +0.01 nats",
        words,
        clean["error_change"] <= 0.5 and clean["nll_change"] <= 0.01,
    )
    for kind, about in HARMLESS.items():
        one = kinds[kind]["methods"]["adapt"]
        words = f"{one['error_change']:+.2f} ± {one['error_change_se']:.2f}, worst {one['error_worst']:+.1f}"
        words = (
            f"{words} ({len(one['by_cell'])} cells)"
            if len(one["by_cell"]) > 1
            else f"{one['error_change']:+.2f} (1 cell)"
        )
        met = one["error_change"] <= 1 + ROUNDING and one["error_worst"] <= 3 + ROUNDING
        yield f"{about}: error at most +1 point in the mean, +3 in the worst cell", words, met
    both = kinds["two classes, severity 5"]["methods"]
    ratio = _ratio(both["adapt"]["error"], both["plain"]["error"])
    words = f"{both['adapt']['error']:.1f} / {both['plain']['error']:.1f} = {ratio:.2f}"
    yield "two classes under corruption: error at most half of plain", words, ratio <= 0.5
    alarm = alarm_scores(network["alarms"])
    words = f"{alarm['auroc']:.4f} (worst corruption {alarm['auroc_worst']:.3f})"
    yield "alarm, 16 examples, severity 3: AUROC at least 0.99", words, alarm["auroc"] >= 0.99
    words = f"{alarm['false']:.1f} % of {alarm['groups']}"
    yield "alarm: at most 1 % false alarms at p <= 0.01", words, alarm["false"] <= 1
    mix, look = told_apart(network)
    words = f"mixes {mix:.0f} %, looks {look:.0f} %"
    yield "another mix and another look told apart in at least 90 % of cells", words, min(mix, look) >= 90


def _ratio(value: float, base: float) -> float:
    return value / base if base else (math.inf if value else 0.0)


def noise(network: dict[str, Any]) -> str:
    """What the noise adds to the adapted centre, in words."""
    methods = network["regimes"]["severity 5"]["methods"]
    with_noise, without = methods["adapt + noise"]["by_cell"], methods["adapt"]["by_cell"]
    parts = []
    for key, unit, digits in (("error", "points", 2), ("nll", "nats", 4)):
        changes = [one[key] - without[name][key] for name, one in with_noise.items()]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        words = "error" if key == "error" else "NLL"
        parts.append(f"the {words} by {statistics.mean(changes):+.{digits}f} ± {error:.{digits}f} {unit}")
    eces = f"{methods['adapt']['ece']:.1f} to {methods['adapt + noise']['ece']:.1f} %"
    return f"At severity 5 noise changes {' and '.join(parts)}, and the ECE from {eces}."


def report(found: dict[str, Any], about: str) -> str:
    """The whole page."""
    judged = [one for network in found.values() for one in network["criteria"] if one[2] is not None]
    met = sum(bool(one[2]) for one in judged)
    parts = [ABOUT.strip(), f"{about}. {_sizes(found)}", f"**{met} of {len(judged)} criteria are met.**"]
    parts.append(_criteria_table(found).markdown())
    parts.append(_short_table(found).markdown())
    parts.append(
        "\n".join(f"- **Noise about the adapted centre, {name}.** {noise(one)}" for name, one in found.items())
    )
    parts.append(_alarm_table(found).markdown())
    parts += [_network_table(name, network).markdown() for name, network in found.items()]
    return "\n\n".join(parts)


def _sizes(found: dict[str, Any]) -> str:
    texts = []
    for name, one in found.items():
        some = f", one in {one['thin']} cells of most regimes" if one["thin"] > 1 else ""
        plain = one["regimes"]["clean"]["methods"]["plain"]
        texts.append(
            f"{name}: {one['about']}, temperature {one['temperature']:.2f}, clean error {plain['error']:.1f} %{some}"
        )
    return f"{'; '.join(texts)}."


def _criteria_table(found: dict[str, Any]) -> Table:
    names = [one[0] for one in next(iter(found.values()))["criteria"]]
    marks = {True: "✓", False: "✗", None: "-"}
    body = []
    for place, name in enumerate(names):
        cells = [network["criteria"][place] for network in found.values()]
        body.append([name, *(f"{marks[cell[2]]} {cell[1]}" for cell in cells)])
    return Table("Criteria for `adapt` and `Monitor`", ["criterion", *found], body)


def _columns(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The networks of each column of the table of errors: those that differ in their seed alone share one."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for name, network in found.items():
        columns.setdefault(name.partition(", seed")[0], []).append(network)
    return {
        name if len(networks) == 1 else f"{name}, mean of {len(networks)}": networks
        for name, networks in columns.items()
    }


def _short_table(found: dict[str, Any]) -> Table:
    kinds = {kind: regime["about"] for network in found.values() for kind, regime in network["regimes"].items()}
    shown = ("plain", "prediction-time BN", "adapt")
    columns, body = _columns(found), []
    for kind in sorted(
        kinds, key=lambda kind: (not kind.startswith("severity"), kind if "severity" in kind[:8] else "")
    ):
        row = [f"{kind}: {kinds[kind]}"]
        for networks in columns.values():
            every = [network["regimes"][kind]["methods"] for network in networks if kind in network["regimes"]]
            means = [statistics.mean(one[name]["error"] for one in every) for name in shown if every]
            row.append(" / ".join(f"{mean:.1f}" for mean in means))
        body.append(row)
    return Table(f"Error in %: {' / '.join(shown)}", ["regime", *columns], body)


def _alarm_table(found: dict[str, Any]) -> Table:
    body = []
    for name, network in found.items():
        one = alarm_scores(network["alarms"])
        mix, look = told_apart(network)
        never = f" ({one['never']} of 15 never)" if one["never"] else ""
        body.append(
            [
                name,
                f"{one['auroc']:.4f}",
                f"{one['auroc_distance']:.4f}",
                f"{one['power']:.0f}",
                f"{one['false']:.1f}",
                f"{one['delay']:.1f}{never}",
                f"{one['monitor_false']} in {one['groups']}",
                f"{mix:.0f}",
                f"{look:.0f}",
            ]
        )
    columns = ["network", "AUROC of p", "AUROC of the distance", "alarms %", "false alarms %", "delay of a `Monitor`"]
    columns += ["its false alarms", "mixes told %", "looks told %"]
    title = "The alarm on mini-batches of 16, severity 3; delays in mini-batches; mixes and looks by 128 examples"
    return Table(title, columns, body)


def _network_table(name: str, network: dict[str, Any]) -> Table:
    body = []
    for kind, regime in network["regimes"].items():
        for method, one in regime["methods"].items():
            about = METHODS[method]
            changes = ["", "", ""]
            if method != "plain":
                several = len(one["by_cell"]) > 1
                changes = [
                    f"{one['error_change']:+.2f}" + (f" ± {one['error_change_se']:.2f}" if several else ""),
                    f"{one['error_worst']:+.1f}",
                    f"{one['nll_change']:+.3f}" + (f" ± {one['nll_change_se']:.3f}" if several else ""),
                ]
            scores = [f"{one['error']:.2f}", f"{one['nll']:.3f}", f"{one['ece']:.2f}", *changes]
            scores += [f"{one['coverage']:.1f}", f"{one['size']:.2f}", f"{about.adapting} + {about.predicting}"]
            body.append(
                [f"{kind}: {regime['about']}" if method == "plain" else kind, method, *scores, f"{len(one['by_cell'])}"]
            )
    columns = ["regime", "method", "error %", "NLL", "ECE %", "change of error", "worst", "change of NLL", "coverage %"]
    return Table(name, [*columns, "size", "passes", "cells"], body)
