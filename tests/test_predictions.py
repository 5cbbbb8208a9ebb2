"""What predictions show of themselves: one line, columns and data frames."""

from __future__ import annotations

import pytest
import torch

import stochbn
from conftest import mlp, normal, settled
from stochbn.predictions import Estimate, MultilabelPrediction, Prediction

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])


def test_a_prediction_is_shown_in_one_line() -> None:
    shown = repr(Prediction(PROBS, torch.tensor([0.5, 0.4])))
    assert shown == "<Prediction: probs [2, 3], mean entropy 0.72, mean mutual information 0.27>"
    kept = Prediction(PROBS, torch.zeros(2), PROBS.log().expand(5, 2, 3), note="one pass")
    assert repr(kept).endswith(", 5 draws kept; one pass>")
    estimate = Estimate(torch.zeros(4), torch.full((4,), 4.0), torch.zeros(4), torch.full((4,), 9.0))
    assert repr(estimate) == "<Estimate: mean [4], mean std 2, mean total std 3>"
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(48, 4, seed=9)], 6)
    shown = repr(stochbn.Predictive(model, posterior))
    assert shown.startswith("<Predictive of Sequential: 50 draws of <Joint: ")
    assert "\n" not in shown
    assert repr(stochbn.Predictive(model)).endswith("50 draws of None>")


def test_columns_are_a_row_for_each_example() -> None:
    found = Prediction(PROBS, torch.tensor([0.5, 0.4])).columns(["a", "b", "c"], top=2)
    assert list(found) == ["class", "probability", "class_2", "probability_2", "entropy", "mutual_information"]
    assert (found["class"], found["class_2"]) == (["a", "c"], ["b", "a"])
    assert found["probability"] == pytest.approx([0.7, 0.8])
    assert found["mutual_information"] == pytest.approx([0.8018 - 0.5, 0.6390 - 0.4], abs=1e-4)
    labels = MultilabelPrediction(PROBS, torch.zeros(2)).columns()
    assert list(labels) == ["probability_0", "probability_1", "probability_2", "entropy", "mutual_information"]
    numbers = Estimate(torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)).columns()
    assert list(numbers) == ["mean_0", "mean_1", "std_0", "std_1", "total_std_0", "total_std_1"]


def test_data_frames_have_the_columns_and_every_probability() -> None:
    pandas = pytest.importorskip("pandas")
    frame = Prediction(PROBS, torch.zeros(2)).to_pandas(["a", "b", "c"])
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns)[-3:] == ["probability_a", "probability_b", "probability_c"]
    assert frame["class"].tolist() == ["a", "c"]
    torch.testing.assert_close(torch.tensor(frame.iloc[:, -3:].to_numpy(), dtype=torch.float32), PROBS)
    assert next(iter(MultilabelPrediction(PROBS, torch.zeros(2)).to_pandas().columns)) == "probability_0"
    assert list(Estimate(torch.zeros(3), torch.ones(3), torch.ones(3), torch.ones(3)).to_pandas().columns) == [
        "mean",
        "std",
        "total_std",
    ]


def test_what_has_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="dense outputs have no table"):
        Prediction(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4)).to_pandas()
    with pytest.raises(ValueError, match="2 names of classes, and the network has 3"):
        Prediction(PROBS, torch.zeros(2)).columns(["a", "b"])
    with pytest.raises(ValueError, match="no table"):
        Estimate(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4)).to_pandas()
