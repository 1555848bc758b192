"""tools/fine_tuning.py: draws, figures and the table."""

import json
from pathlib import Path

import fine_tuning
import numpy as np
import pytest
import torch
from builders import TRAINABLE, labelled, nuclei_dataset, tiny_network

from kg_detectron.inference.calibration import fit_scores
from kg_detectron.inference.model_file import save_model
from kg_detectron.modeling import Scores
from kg_detectron.training.validation import validate


def test_a_larger_draw_holds_the_smaller_one_and_another_seed_draws_others() -> None:
    images = labelled(tiny_network().eval(), 8)
    few, more, others = (
        {one.name for one in fine_tuning.draw(images, n, seed)} for n, seed in ((3, 1), (6, 1), (3, 2))
    )
    assert len(few) == 3
    assert len(more) == 6
    assert few < more
    assert few != others


def test_f1_counts_cells_from_the_models_own_threshold_on() -> None:
    model = tiny_network().eval()
    images = labelled(model, 2)
    result = validate(model, images)
    for threshold in np.quantile(result.scores, (0.0, 0.9)):
        model.scores = Scores(threshold=float(threshold))
        kept = result.scores >= threshold
        expected = 2 * (result.right & kept).sum() / (kept.sum() + result.positives)
        assert fine_tuning.figures_of(model, images)["f1"] == pytest.approx(expected)


def test_f1_knows_scores_that_go_by_size() -> None:
    model = tiny_network().eval()
    images = labelled(model, 2)
    result = validate(model, images)
    sides = np.sqrt((result.boxes[:, 2:] - result.boxes[:, :2]).prod(1))
    model.scores = fit_scores(result.scores, sides > np.median(sides), result.positives, result.boxes)
    assert model.scores.log_odds
    probability = model.scores(torch.from_numpy(result.scores), torch.from_numpy(result.boxes)).numpy()
    kept = probability >= model.threshold
    assert 0 < kept.sum() < len(kept)
    expected = 2 * (result.right & kept).sum() / (kept.sum() + result.positives)
    assert fine_tuning.figures_of(model, images)["f1"] == pytest.approx(expected)


def test_the_table_has_a_row_for_each_start_and_number_of_images(tmp_path: Path) -> None:
    for start, count, draw, value in (("nuclei", 5, 1, 0.5), ("nuclei", 5, 2, 0.7), ("nothing", 20, 1, 0.25)):
        figures = dict.fromkeys(fine_tuning.FIGURES, value)
        content = {"start": start, "images": count, "draw": draw, "minutes": 1, "figures": figures}
        (tmp_path / f"{start}_{count}_{draw}.json").write_text(json.dumps(content))
    assert fine_tuning.table(tmp_path).splitlines()[2:] == [
        "| nothing | 20 | 1 | 25.0 | 25.0 | 25.0 |",
        "| nuclei | 5 | 2 | 60.0 ± 14.1 | 60.0 ± 14.1 | 60.0 ± 14.1 |",
    ]


def test_runs_that_are_there_are_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = nuclei_dataset(tmp_path / "data", 6)
    model = tmp_path / "small.safetensors"
    save_model(tiny_network(**TRAINABLE).eval(), model)
    dataset = [str(data), str(data.parent), str(data), str(data.parent)]
    options = [*dataset, "-o", str(tmp_path / "figures"), "--runs", str(tmp_path / "runs"), "--starts", str(model)]
    options += ["--draws", "1", "--minutes", "0.01"]
    assert fine_tuning.main([*options, "--counts", "0", "4"]) == 0
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == ["small_0_draw1.json", "small_4_draw1.json"]
    times = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    assert fine_tuning.main([*options, "--counts", "0", "4"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    assert "| small | 4 | 1 |" in capsys.readouterr().out
