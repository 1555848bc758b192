"""tools/reproduce.py: rows, resumption, tables."""

import json
import subprocess
from pathlib import Path

import make_synthetic
import pytest
import reproduce

ROOT = Path(__file__).parents[2]
SMALL = ["INPUT.SIZE", "(64,64)", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "5"]
SMALL += ["MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", "0.0"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plan of one training, and of one row that decodes otherwise, on four small images."""
    make_synthetic.main(
        ["--kind", "nuclei", "--train", "4", "--val", "2", "--size", "64", "64", "--cells", "2", "4"]
        + ["--seed", "0", "--output", str(tmp_path)]
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = [
        reproduce.Row("a row", "kg_r18_synthetic_cpu"),
        reproduce.Row("a row: hop", "kg_r18_synthetic_cpu", ("second_hop",), "a row"),
    ]
    monkeypatch.setitem(reproduce.PLANS, "cpu", rows)
    return tmp_path


def test_rows_are_trained_once_evaluated_and_put_into_tables(plan, monkeypatch, capsys):
    command = ["cpu", "--dataset", "synthetic_val", "--output", str(plan / "runs"), "--results", str(plan / "results")]
    assert reproduce.main([*command, "--seeds", "7", "--opts", *SMALL]) == 0
    first, second = (
        json.loads((plan / "results" / "cpu" / f"{name}_seed7.json").read_text()) for name in ("a_row", "a_row-hop")
    )
    assert (first["row"], first["seed"], first["iterations"], first["images"]) == ("a row", 7, 5, 2)
    assert (
        first["initial_weights"] == "random"
        and second["recipes"] == ["second_hop"]
        and first["figures"]["parameters_M"] > 0
    )
    assert first["figures"]["training_minutes"] == second["figures"]["training_minutes"] > 0
    assert "HOPS: 2" in (plan / "runs" / "cpu" / "a_row-hop_seed7" / "config.yaml").read_text()
    weights = [plan / "runs" / "cpu" / f"{name}_seed7" / "model_final.pth" for name in ("a_row", "a_row-hop")]
    assert weights[1].is_file() and all(path.stat().st_size > 1000 for path in weights)

    def refuse(*_: str) -> None:
        raise AssertionError("what is done is done again")

    monkeypatch.setattr(reproduce, "_python", refuse)
    assert reproduce.main([*command, "--seeds", "7", "--opts", *SMALL]) == 0
    table = (plan / "results" / "cpu" / "tables.md").read_text()
    assert table.count("\n| a row") == 2 * 3 and "kg_r18_synthetic_cpu, random" in table
    assert f"{first['figures']['mask_AP@0.5']:.2f}" in table


def test_a_run_whose_head_is_not_fitted_yet_goes_on(plan, monkeypatch):
    """Killed after its last checkpoint, while the confidence head was fitted."""
    row = reproduce.Row("a row: head", "kg_r18_synthetic_cpu", ("confidence",))
    monkeypatch.setitem(reproduce.PLANS, "cpu", [row])
    folder = plan / "runs" / "cpu" / "a_row-head_seed1"
    folder.mkdir(parents=True)
    called = []

    def note(tool: str, *arguments: str) -> None:
        called.append(tool)
        raise subprocess.CalledProcessError(1, [tool])

    monkeypatch.setattr(reproduce, "_python", note)
    command = ["cpu", "--output", str(plan / "runs"), "--results", str(plan / "results")]
    for file in ("model_final.pth", "confidence.json"):
        (folder / file).touch()
        reproduce.main(command)
    assert called == ["train_net.py", "compare.py"]


def test_a_row_that_fails_does_not_stop_the_others(plan, monkeypatch, capsys):
    called = []

    def fail(tool: str, *arguments: str) -> None:
        called.append(tool)
        raise subprocess.CalledProcessError(1, [tool])

    monkeypatch.setattr(reproduce, "_python", fail)
    assert reproduce.main(["cpu", "--output", str(plan / "runs"), "--results", str(plan / "results")]) == 1
    assert called == ["train_net.py", "train_net.py"]
    assert capsys.readouterr().err.count("FAILED") == 2


def test_mean_and_spread():
    assert reproduce.spread([1.0]) == "1.00"
    assert reproduce.spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert reproduce.spread([1.0, None]) == "n/a"


def test_every_row_has_its_config_and_its_owner():
    for rows in reproduce.PLANS.values():
        names = [row.name for row in rows]
        assert len({reproduce.file_name(name) for name in names}) == len(names)
        for row in rows:
            assert (ROOT / "configs" / f"{row.config}.yaml").is_file()
            assert all(reproduce.recipe_file(recipe).is_file() for recipe in row.recipes)
            assert not row.weights_of or row.weights_of in names[: names.index(row.name)]


def test_the_stored_results_make_the_stored_tables():
    plans = [plan for plan in reproduce.PLANS if (ROOT / "results" / plan).is_dir()]
    assert "cpu" in plans
    for plan in plans:
        stored = ROOT / "results" / plan
        assert reproduce.tables(stored, reproduce.PLANS[plan]) == (stored / "tables.md").read_text()
    assert reproduce.file_name("kg lite: the paper's decoding") == "kg_lite-the_papers_decoding"


def test_plans_from_imagenet_weights_set_none_to_random(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(reproduce.Reproduction, "run", lambda self, row, seed: seen.update({row.name: self.changes}))
    for plan, weights in {"cpu": "BACKBONE_WEIGHTS", "cpu_imagenet": ""}.items():
        assert reproduce.main([plan, "--output", str(tmp_path), "--results", str(tmp_path)]) == 0
        assert ("BACKBONE_WEIGHTS" in "".join(seen["mask_rcnn FPN"])) == bool(weights)


def test_both_data_sets_have_the_rows_of_both_tables(capsys, tmp_path):
    for size in ("cpu", "gpu"):
        names = {row.name for row in reproduce.PLANS[f"{size}_usiigaci"]}
        assert names <= {row.name for row in reproduce.PLANS[size]} and names >= {"kg", "kg seg s1", "kg single scale"}
        assert names >= {"dcan", "cosine_embedding", "cornernet", "mask_rcnn C4", "stardist", "fcis", "kg lite"}
        assert all("usiigaci" in row.config for row in reproduce.PLANS[f"{size}_usiigaci"])
    folders = ["--output", str(tmp_path), "--results", str(tmp_path)]
    assert reproduce.main(["cpu_usiigaci", "--dry-run", "--minutes", "20", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fcis, seed 1: trains fcis_usiigaci_cpu, 20 minutes, and is evaluated on usiigaci_val" in lines
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "fcis_seed1.json").write_text("{}")
    assert reproduce.main(["cpu", "--dry-run", "--rows", "fcis", "kg: + second hop", *folders]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "fcis, seed 1: done",
        "kg: + second hop, seed 1: decodes kg by kg_r18_dsb2018_cpu + paper_decoding + sharper_votes + second_hop",
    ]


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["cpu", "--rows", "kg heavy"])
    assert "kg heavy" in capsys.readouterr().err
