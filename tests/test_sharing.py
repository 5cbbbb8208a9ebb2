"""Posteriors are shared through the Hub, which a folder stands for here."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stochbn
from conftest import fit_factorized, make_posterior, mlp, normal, seeded, settled

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every repository is a folder."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
            assert private
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            assert commit_message
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}"

    def download(repo_id: str, filename: str, **about: Any) -> str:
        assert about == {"revision": "main", "token": "secret", "library_name": "stochbn"}
        if not (root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository\nand more")
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def push(posterior: stochbn.Posterior, **about: Any) -> str:
    return posterior.push_to_hub("someone/net-sbn", private=True, token="secret", **about)


def test_a_shared_posterior_predicts_as_the_one_it_was(hub: Path) -> None:
    model = settled(mlp(), 4)
    posterior = fit_factorized(model, [normal(16, 4, seed=seed) for seed in range(4)], 8)
    assert push(posterior) == "https://hub/someone/net-sbn"
    loaded = stochbn.from_pretrained("someone/net-sbn", revision="main", token="secret")
    x = normal(5, 4, seed=9)
    one, other = (stochbn.Predictive(model, p, draws=4)(x, generator=seeded()).probs for p in (posterior, loaded))
    assert torch.equal(one, other)


def test_a_posterior_is_loaded_from_a_local_folder(hub: Path, tmp_path: Path) -> None:
    posterior = make_posterior(batch_size=24)
    push(posterior)
    loaded = stochbn.from_pretrained(hub / "someone" / "net-sbn")
    assert loaded.batch_size == 24
    assert torch.equal(loaded.expected, posterior.expected)
    with pytest.raises(FileNotFoundError, match=r"posterior\.sbn\.safetensors"):
        stochbn.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a local folder, which has no revision"):
        stochbn.from_pretrained(tmp_path, revision="v1")


def test_the_card_says_what_it_is_of_how_it_was_fitted_and_what_it_gives(hub: Path) -> None:
    posterior = replace(make_posterior(skipped={"aux": "not called"}), temperature=1.25)
    before = {"error": 5.0, "nll": 0.2123456, "ece": 0.03, "auroc": 0.9}
    push(posterior, network="timm/resnet26d", before=before, after={**before, "nll": 0.19, "auroc": 0.95})
    text = (hub / "someone" / "net-sbn" / "README.md").read_text()
    loaded = huggingface_hub.ModelCard(text)
    assert loaded.data.library_name == "stochbn"
    assert loaded.data.base_model == "timm/resnet26d"
    for line in (
        "# net-sbn",
        'posterior = stochbn.from_pretrained("someone/net-sbn")',
        "- kind: factorized",
        "- noise: that of mini-batches of 16 examples; 7 were observed",
        "- drawn: 3 channels in 1 batch-norm layers",
        "- temperature: 1.25",
        "- not drawn: `aux` (not called)",
        "| NLL (nats) | 0.2123 | 0.19 |",
        "| AUROC | 0.9 | 0.95 |",
    ):
        assert line in text.replace("  # `model`", "\n").splitlines(), line


def test_the_card_without_a_network_and_scores_has_none(hub: Path) -> None:
    push(make_posterior(batch_size=None), network="our own: a net\nwith lines")
    text = (hub / "someone" / "net-sbn" / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.base_model is None
    assert "What it gives" not in text
    assert "mini-batches as they came" in text


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"nll": 0.2}, None, "the same scores before and after"),
        ({"accuracy": 0.2}, {"accuracy": 0.3}, "some of error, nll, ece, auroc, got 'accuracy'"),
        ({"nll": float("nan")}, {"nll": 0.3}, "'nll' must be a finite number, got nan"),
    ],
)
def test_wrong_scores_are_told_before_anything_is_uploaded(hub: Path, before: Any, after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        push(make_posterior(), before=before, after=after)
    assert not hub.exists()


def test_what_is_not_there_is_told(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder 'nobody/nothing', and .* no such repository"):
        stochbn.from_pretrained("nobody/nothing", revision="main", token="secret")


def test_a_name_that_cannot_be_on_the_hub_is_told() -> None:
    with pytest.raises(FileNotFoundError, match="is no folder, and no name on the Hugging Face Hub"):
        stochbn.from_pretrained("not a folder/at all/here")


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stochbn\[hub\]'"):
        stochbn.from_pretrained("someone/net-sbn")
