"""What `rivals.py` compares: each method as its library's documentation says, from a trained network to predictions."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stochbn
from stochbn import Posterior, Predictive

GRID = 9
"""Prior precisions in the grid search of laplace-torch, powers of ten; its own default is 100 in the same range."""
AUGMENTED = 8
"""Draws over the input."""
MASKS = 50
"""Passes with dropout."""
PLAIN, DEFAULT = "plain network", "stochbn: fit, calibrate"
Predict = Callable[[Tensor], Tensor]
"""From inputs ``[N, C, H, W]`` to probabilities ``[N, K]``."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a method is given.

    Attributes:
        models: the trained networks that a method uses, in evaluation mode: one, or all.
        train: the images that they were trained on.
        augmented: the same images, each augmented once as in training.
        held_out: images that they were not trained on.
    """

    models: Sequence[nn.Module]
    train: DataLoader[Any]
    augmented: DataLoader[Any]
    held_out: DataLoader[Any]

    @property
    def model(self) -> nn.Module:
        """The network of a method that uses one."""
        return self.models[0]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        about: how the method is used, in words.
        fit: from a subject to a function that predicts, and what was chosen in words.
        modules: what must be importable beside stochbn.
        packages: whose versions are named.
        uses: each network by itself, all of them as an ensemble, or the one that was trained with dropout.
    """

    about: str
    fit: Callable[[Subject], tuple[Predict, str]]
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    uses: Literal["each", "ensemble", "dropout"] = "each"


def plain(subject: Subject) -> tuple[Predict, str]:
    """The network as it is."""
    return lambda x: subject.model(x).softmax(1), ""


def temperature(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.calibrate` without draws."""
    posterior = stochbn.fit(subject.model, subject.augmented)
    posterior = stochbn.calibrate(subject.model, posterior, subject.held_out, batch_sizes=[math.inf])
    return _predictive(subject.model, posterior), f"temperature {posterior.temperature:.2f}"


def netcal_temperature(subject: Subject) -> tuple[Predict, str]:
    """Temperature scaling of netcal, of the probabilities of the held-out images.

    They are float64: with float32 its optimiser stops where it starts, at a temperature of 1.
    """
    from netcal.scaling import TemperatureScaling

    probs, labels = [], []
    with torch.no_grad():
        for x, y in subject.held_out:
            probs.append(subject.model(x).softmax(1))
            labels.append(y)
    scaling = TemperatureScaling()
    scaling.fit(torch.cat(probs).double().numpy(), torch.cat(labels).numpy())

    def predict(x: Tensor) -> Tensor:
        return torch.from_numpy(scaling.transform(subject.model(x).softmax(1).double().numpy()))

    return predict, f"temperature {1 / float(scaling.temperature[0]):.2f}"


def calibrated(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.fit` and `stochbn.calibrate` with their defaults."""
    posterior = stochbn.fit(subject.model, subject.augmented)
    posterior = stochbn.calibrate(subject.model, posterior, subject.held_out)
    return _predictive(subject.model, posterior), posterior.choice


def fitted(subject: Subject) -> tuple[Predict, str]:
    """`stochbn.fit` alone with its defaults."""
    return _predictive(subject.model, stochbn.fit(subject.model, subject.augmented)), ""


def over_inputs(subject: Subject) -> tuple[Predict, str]:
    """Draws over the input alone, which flip and shift it, with the temperature that is best for them."""
    changes = stochbn.augment.chain(stochbn.augment.flip(), stochbn.augment.shift(4))
    posterior = stochbn.fit(subject.model, subject.train, augment=changes)
    posterior = stochbn.calibrate(
        subject.model, posterior, subject.held_out, batch_sizes=[math.inf], augment=changes, draws=AUGMENTED
    )
    predict = _predictive(subject.model, posterior, draws=AUGMENTED, augment=changes)
    return predict, f"temperature {posterior.temperature:.2f}"


def _predictive(model: nn.Module, posterior: Posterior, **settings: Any) -> Predict:
    predictive = Predictive(model, posterior, **settings)
    generator = torch.Generator().manual_seed(0)
    return lambda x: predictive(x, generator=generator).probs


def mc_batch_norm(subject: Subject) -> tuple[Predict, str]:
    """`MCBatchNorm` of TorchUncertainty with its defaults."""
    from torch_uncertainty.post_processing import MCBatchNorm

    MCBatchNorm.mc_batch_norm_layers = []  # of the class: the layers of an earlier network would stay in it
    wrapped = MCBatchNorm(subject.model)
    wrapped.fit(subject.augmented)
    wrapped.eval()

    def predict(x: Tensor) -> Tensor:
        logits = wrapped(x).view(wrapped.num_estimators, len(x), -1)
        return logits.softmax(2).mean(0)

    return predict, f"{wrapped.num_estimators} mini-batches of {wrapped.mc_batch_size}"


def laplace(subject: Subject, *, method: str, link: str) -> tuple[Predict, str]:
    """A Laplace approximation of the last layer, whose prior precision is optimised in the way that is named.

    The grid search gets a function as its loss. The default loss of laplace-torch 0.3 is a running mean, which is not
    reset from one value of the grid to the next, so that the search ends at the last one.
    """
    from laplace import Laplace

    approximation = Laplace(
        copy.deepcopy(subject.model), "classification", subset_of_weights="last_layer", hessian_structure="kron"
    )
    approximation.fit(subject.augmented)
    options: dict[str, Any] = {"method": method, "pred_type": "glm", "link_approx": link}
    if method == "gridsearch":
        options |= {"val_loader": subject.held_out, "grid_size": GRID, "loss": _nll}
    approximation.optimize_prior_precision(**options)
    precision = approximation.prior_precision.mean().item()
    return lambda x: approximation(x, pred_type="glm", link_approx=link), f"prior precision {precision:.3g}"


def _nll(probs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.nll_loss(probs.log(), labels)


def ensemble(subject: Subject) -> tuple[Predict, str]:
    """The mean probabilities of all networks."""
    return lambda x: torch.stack([model(x).softmax(1) for model in subject.models]).mean(0), ""


def dropout(subject: Subject) -> tuple[Predict, str]:
    """Monte Carlo dropout: the mean of passes with all dropout layers in training mode."""
    model = copy.deepcopy(subject.model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return lambda x: torch.stack([model(x).softmax(1) for _ in range(MASKS)]).mean(0), ""


METHODS: dict[str, Method] = {
    PLAIN: Method("as it is", plain),
    "temperature (stochbn)": Method("`fit`, then `calibrate(..., batch_sizes=[math.inf])`: no draws", temperature),
    "temperature (netcal)": Method("`TemperatureScaling()`", netcal_temperature, ("netcal",), ("netcal",)),
    DEFAULT: Method("`fit`, `calibrate` and `Predictive` with their defaults", calibrated),
    "stochbn: fit alone": Method("`fit` and `Predictive` with their defaults: draws at the fitted noise", fitted),
    f"stochbn: {AUGMENTED} augmented draws": Method(
        f"`augment=chain(flip(), shift(4))` in `fit`, `calibrate(..., batch_sizes=[math.inf], draws={AUGMENTED})` and "
        f"`Predictive(..., draws={AUGMENTED})`: draws over the input alone",
        over_inputs,
    ),
    "MCBatchNorm (TorchUncertainty)": Method(
        "`MCBatchNorm(model)`, then `fit(train_loader)`",
        mc_batch_norm,
        ("torch_uncertainty", "lightning"),
        ("torch-uncertainty",),
    ),
    **{
        f"Laplace, {words}": Method(
            "`Laplace(model, 'classification', subset_of_weights='last_layer', hessian_structure='kron')`, `fit`, then "
            f"`optimize_prior_precision(method={method!r}{more})` and predictions with `link_approx={link!r}`",
            functools.partial(laplace, method=method, link=link),
            ("laplace",),
            ("laplace-torch",),
        )
        for words, method, link, more in (
            ("grid search, probit", "gridsearch", "probit", f", grid_size={GRID}, loss=..."),
            ("marginal likelihood, probit", "marglik", "probit", ""),
        )
    },
    "MC dropout": Method(
        f"the mean probabilities of {MASKS} passes with dropout, of a network that was trained with it",
        dropout,
        uses="dropout",
    ),
    "deep ensemble of 3": Method("the mean probabilities of the three networks", ensemble, uses="ensemble"),
}


def version_of(method: Method) -> str:
    """The version of what a method runs with: its packages, or a checksum of stochbn's code."""
    if method.packages:
        return ", ".join(f"{package} {version(package)}" for package in method.packages)
    digest = hashlib.sha256()
    for file in sorted(Path(stochbn.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"stochbn {stochbn.__version__} ({digest.hexdigest()[:12]})"


def missing(method: Method) -> str:
    """Why a method cannot be run here; empty if it can."""
    try:
        for module in method.modules:
            importlib.import_module(module)
        version_of(method)
    except (ImportError, PackageNotFoundError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        return f"{type(error).__name__}: {error}"
    return ""
