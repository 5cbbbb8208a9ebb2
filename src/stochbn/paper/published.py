"""The numbers that Atanov et al. (2018) published."""

from __future__ import annotations

from stochbn.report.tables import Pair, Published

__all__ = ["PRINTED", "PUBLISHED", "PUBLISHED_DATA", "published"]

PUBLISHED: dict[str, dict[str, dict[str, Pair]]] = {
    "lenet5": {
        "plain": {"error": (None, 0.53), "nll": (None, 0.025)},
        "Deep Ensembles": {"error": (0.40, 0.40), "nll": (0.016, 0.015)},
        "Dropout": {"error": (0.42, 0.42), "nll": (0.014, 0.014)},
    },
    "vgg11": {
        "plain": {"error": (None, 5.76), "nll": (None, 0.302)},
        "Deep Ensembles": {"error": (4.81, 4.81), "nll": (0.191, 0.162)},
        "Dropout": {"error": (5.32, 5.38), "nll": (0.155, 0.149)},
    },
    "resnet18": {
        "plain": {"error": (None, 4.35), "nll": (None, 0.255)},
        "Deep Ensembles": {"error": (3.37, 3.34), "nll": (0.138, 0.110)},
    },
}
"""Table 1 of Atanov et al., 2018: for every network and method, error (percent) and NLL (nats) without and with SBN."""

PRINTED: dict[str, dict[str, Pair]] = {
    "lenet5": {"plain": (None, 0.0286), "Deep Ensembles": (0.0157, 0.0150), "Dropout": (0.0142, 0.0145)}
}
"""The NLL without and with SBN that the published notebook printed; table 1 differs from it."""

PUBLISHED_DATA = {"lenet5": "mnist", "vgg11": "cifar10:0-4", "resnet18": "cifar10:0-4"}
"""What the published numbers are from. Table 1 says CIFAR-10, but the published entropies end below ln 5."""


def published(network: str, data: str) -> Published | None:
    """What was published of a network, if it was trained on this data there."""
    return Published(PUBLISHED[network], PRINTED.get(network, {})) if data == PUBLISHED_DATA.get(network) else None
