"""Share posteriors on the Hugging Face Hub, in a repository with the file and a model card."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stochbn.files import write_bytes

if TYPE_CHECKING:
    from stochbn.posteriors import Posterior

__all__ = ["FILE", "card", "download", "push_to_hub"]

FILE = "posterior.sbn.safetensors"
"""The name of a posterior's file in its repository or folder."""

SCORES = {"error": ("error", "%"), "nll": ("NLL", "nats"), "ece": ("ECE", ""), "auroc": ("AUROC", "")}
"""The scores of a card, by their names in `stochbn.metrics`: title and unit."""


def push_to_hub(
    posterior: Posterior,
    repository: str,
    *,
    network: str = "",
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Share a posterior on the Hugging Face Hub, with a model card; `stochbn.from_pretrained` loads it.

    Args:
        posterior: the posterior.
        repository: ``owner/name``, which is made if there is none.
        network: what it is a posterior of: the name of a repository on the Hub, or words.
        before: scores of the network alone for the card: any of ``error`` (percent), ``nll`` (nats), ``ece`` and
            ``auroc``, as `stochbn.metrics` gives them.
        after: the same scores with this posterior.
        private: whether a repository that is made is private; None is what its owner has set.
        token: of the Hub; None takes the one that ``hf auth login`` has stored.

    Returns:
        The address of the upload.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: scores that are not numbers, have unknown names or are there before or after only.
        Exception: as huggingface_hub raises it where the Hub refuses, or there is no connection.
    """
    text = card(posterior, repository, network, before or {}, after or {})
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        posterior.save(folder / FILE)
        write_bytes(folder / "README.md", text.encode())
        api.create_repo(repository, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a posterior of batch-norm statistics"
        )
    return str(found)


def download(repository: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """Return the posterior file of a folder, or of a repository on the Hub; see `stochbn.from_pretrained`."""
    folder = Path(repository)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{str(folder)!r} is a local folder, which has no revision {revision!r:.60}; leave it out")
        return folder / FILE
    name = os.fspath(repository)
    hub = _hub()
    try:
        path = hub.hf_hub_download(name, FILE, revision=revision, token=token, library_name="stochbn")
    except hub.errors.HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is no folder, and no name on the Hugging Face Hub: {error}") from error
    except (hub.errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {name!r}, and {FILE!r} of that repository cannot be had from the Hugging Face Hub "
            f"({type(error).__name__}: {reason:.200})"
        ) from error
    return Path(path)


def card(
    posterior: Posterior, repository: str, network: str, before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """Make the model card of a posterior, as Markdown with a header for the Hub.

    Raises:
        ValueError: a score is not a finite number, has an unknown name, or is missing before or after.
    """
    _check_scores(before, after)
    network = " ".join(network.split())
    model = "`model`, the network that it was fitted to" if not network else f"`model`, the network {network}"
    size = "as they came" if posterior.batch_size is None else f"of {posterior.batch_size:g} examples"
    lines = ["---", "library_name: stochbn", "tags:", "- uncertainty", "- calibration", "- batch-normalization"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", network, re.ASCII):  # may be a repository, to which the card then links
        lines.append(f"base_model: {network}")
    lines += [
        "---",
        "",
        f"# {repository.rpartition('/')[2]}",
        "",
        "A distribution over the batch-norm statistics of a trained network"
        + (f", {network}" if network else "")
        + ", for calibrated uncertainty by Stochastic Batch Normalization "
        "([Atanov et al., 2018](https://arxiv.org/abs/1802.04893)). It belongs to that network's weights, and is no "
        "network itself.",
        "",
        "```python",
        "import stochbn",
        "",
        f'posterior = stochbn.from_pretrained("{repository}")',
        f"predictive = stochbn.Predictive(model, posterior)  # {model}",
        "```",
        "",
        "## How it was fitted",
        "",
        f"- kind: {posterior.kind}",
        f"- noise: that of mini-batches {size}; {posterior.mini_batches} were observed",
        f"- drawn: {posterior.channels} channels in {len(posterior.layers)} batch-norm layers",
        f"- temperature: {posterior.temperature:g}",
    ]
    lines += [f"- not drawn: `{layer}` ({why})" for layer, why in posterior.skipped.items()]
    if before:
        lines += [
            "",
            "## What it gives",
            "",
            "| score | network alone | with this posterior |",
            "| --- | ---: | ---: |",
        ]
        for name, (shown, unit) in SCORES.items():
            if name in before:
                lines.append(f"| {shown}{f' ({unit})' if unit else ''} | {before[name]:.4g} | {after[name]:.4g} |")
    return "\n".join(lines) + "\n"


def _check_scores(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    if unknown := (before.keys() | after.keys()) - SCORES.keys():
        raise ValueError(f"scores must be some of {', '.join(SCORES)}, got {min(unknown)!r}")
    if before.keys() != after.keys():
        raise ValueError(f"expected the same scores before and after, got {list(before)} and {list(after)}")
    for name, value in (*before.items(), *after.items()):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"the score {name!r} must be a finite number, got {value!r:.40}")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        message = "sharing posteriors needs huggingface_hub: pip install 'stochbn[hub]'"
        raise ModuleNotFoundError(message, name="huggingface_hub") from error
    return huggingface_hub
