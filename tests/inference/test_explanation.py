"""Why a model found the boxes that it found: every fate of a group, in a scene where it is known; the picture."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from builders import drawn_image, tiny_network
from torch import Tensor

from kg_detectron.cli.main import main
from kg_detectron.graph import EDGE_INDEX, KEYPOINTS
from kg_detectron.inference import predict, save_model
from kg_detectron.inference.explanation import BOX, NO_AREA, NO_COMBINATION, SUPPRESSED, TOO_FEW, explain
from kg_detectron.modeling import (
    CellRanking,
    KeypointGraphNet,
    KeypointMaps,
    RankingSettings,
    Scores,
    keypoint_targets,
)
from kg_detectron.report.explanation_figure import draw_explanation

TL, TR, BL, BR, CENTRE = range(len(KEYPOINTS))
SIZE = 128, 192  # of the network's input; the image is twice as large
IMAGE = drawn_image(2 * SIZE[0], 2 * SIZE[1])
WHOLE, LONE, SIDE, CROSSED = (10, 10, 50, 60), (80, 10, 110, 40), (120, 60, 170, 110), (20, 80, 60, 115)


def network(**decoding: float) -> KeypointGraphNet:
    """Two scales, whose discs are those of `keypoint_targets`."""
    decoding = {"peak_threshold": 0.004, **decoding}
    return tiny_network(
        norm="GN", cut_from="s1", scales=(1, 2), size=SIZE, radius=5.0, smooth_sigma=2.0, **decoding
    ).eval()


def maps_of(box: tuple[int, ...], stride: int, keypoints: list[int]) -> list[Tensor]:
    """Perfect maps of one cell of which some keypoints show."""
    heatmap, single, group = keypoint_targets([torch.tensor([box]).float()], SIZE, stride)
    hidden = [k for k in range(len(KEYPOINTS)) if k not in keypoints]
    heatmap[:, hidden] = 0
    return [heatmap, single, group]


def crossed(maps: list[Tensor]) -> list[Tensor]:
    """The top left and the bottom right keypoint change places."""
    heatmap, single, group = (part.clone() for part in maps)
    heatmap[:, [TL, BR]] = maps[0][:, [BR, TL]]
    for k, l in ((TL, BR), (BR, TL)):
        single[:, 2 * k : 2 * k + 2] = maps[1][:, 2 * l : 2 * l + 2]
        e, f = 2 * EDGE_INDEX[k, l], 2 * EDGE_INDEX[l, k]
        group[:, e : e + 2] = maps[2][:, f : f + 2]
    return [heatmap, single, group]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> KeypointGraphNet:
    """A network that sees five cells: one at two scales, three with keypoints missing or wrong."""
    every = list(range(len(KEYPOINTS)))
    cells = [maps_of(WHOLE, 1, every), maps_of(LONE, 1, [CENTRE]), maps_of(SIDE, 1, [TL, TR])]
    cells.append(crossed(maps_of(CROSSED, 1, [TL, BR])))
    s1, s2 = [sum(parts) for parts in zip(*cells, strict=True)], maps_of(WHOLE, 2, every)
    s2[0] = s2[0] * 0.9  # less certain than s1
    scales = [
        KeypointMaps(torch.logit(heatmap.clamp(1e-4, 1 - 1e-4)), single, group, stride)
        for (heatmap, single, group), stride in ((s1, 1), (s2, 2))
    ]
    model = network()
    monkeypatch.setattr(model.keypoint_branch, "forward", lambda features: (scales, {1: torch.zeros(1, 4, *SIZE)}))
    return model


def test_every_fate(scene: KeypointGraphNet) -> None:
    explanation = explain(scene, IMAGE)
    groups = {tuple(np.round(group.keypoints[group.opener, :2] / 2 - 0.5)): group for group in explanation.groups}
    by_fate = {group.fate: group for group in explanation.groups}
    assert set(by_fate) == {BOX, SUPPRESSED, NO_AREA, NO_COMBINATION, TOO_FEW}
    assert len(groups) == len(explanation.groups) == 5
    assert by_fate[BOX].scale == 0 and by_fate[SUPPRESSED].scale == 1
    assert by_fate[SUPPRESSED].reason == "suppressed by box 1" and by_fate[SUPPRESSED].number == by_fate[BOX].number
    assert by_fate[NO_COMBINATION].reason == f"{NO_COMBINATION}: tl, tr"
    assert by_fate[TOO_FEW].reason == f"{TOO_FEW}: centre"
    np.testing.assert_allclose(by_fate[BOX].box, np.multiply(WHOLE, 2), atol=2.1)
    for k, (x, y) in enumerate([(10, 10), (49, 10), (10, 59), (49, 59), (29.5, 34.5)]):
        np.testing.assert_allclose(by_fate[BOX].keypoints[k, :2], [2 * x + 1, 2 * y + 1], atol=1.1)
        np.testing.assert_allclose(by_fate[BOX].expected[k], [2 * x + 1, 2 * y + 1], atol=2.1)
    assert ", 5 groups: 1 became a box, 1 suppressed by a better box, 1 corners cross" in explanation.summary()


@pytest.mark.parametrize("seen", ["scene", "random", "ranked", "sized", "border"])
def test_boxes_are_those_of_the_prediction(seen: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue("scene") if seen == "scene" else network(peak_threshold=0.0)
    if seen == "ranked":
        model.ranking = CellRanking(RankingSettings(blur_weight=1.0, overlap_sigma=0.1))
    if seen == "sized":
        model.scores = Scores(side=(8.0, 60.0), log_odds=(-3.0, 3.0))
    if seen == "border":
        model.with_preprocessing(resize="isotropic", border=40, diameter=20.0)
        model.ranking = CellRanking(RankingSettings(overlap_sigma=0.1))
    scale = 0.5 if seen == "border" else None
    boxes = predict(model, IMAGE, scale=scale).boxes.numpy()
    kept = sorted(
        (group for group in explain(model, IMAGE, scale=scale).groups if group.fate == BOX),
        key=lambda group: group.number,
    )
    assert len(boxes) > 0
    np.testing.assert_allclose([group.box for group in kept], boxes, rtol=1e-5)


def test_nothing_found() -> None:
    explanation = explain(network(peak_threshold=1e6), IMAGE)
    assert explanation.groups == [] and explanation.summary() == "0 keypoints, 0 groups."
    assert draw_explanation(IMAGE, explanation).startswith(b"\x89PNG")


def test_only_keypoint_graphs_in_evaluation_are_explained() -> None:
    with pytest.raises(ValueError, match="eval"):
        explain(network().train(), IMAGE)
    with pytest.raises(ValueError, match="only keypoint graphs can be explained, got Linear"):
        explain(torch.nn.Linear(1, 1), IMAGE)


def test_command_draws_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    save_model(model, tmp_path / "model.pth")
    cv2.imwrite(str(tmp_path / "image.png"), IMAGE)
    arguments = ["explain", str(tmp_path / "image.png"), "-m", str(tmp_path / "model.pth")]
    assert main([*arguments, "-o", str(tmp_path / "a.png")]) == 0
    assert "groups" in capsys.readouterr().out
    assert main([*arguments, "-o", str(tmp_path / "b.png")]) == 0
    drawn = cv2.imread(str(tmp_path / "a.png"))
    assert drawn.shape[0] > 600 and drawn.shape[1] > 1200 and drawn.std() > 10
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["explain", str(tmp_path / "no.png"), "-m", str(tmp_path / "model.pth"), "-o", "x.png"]) == 2
    assert "no.png" in capsys.readouterr().err


def test_the_command_takes_a_channel_of_a_scene(tmp_path: Path, monkeypatch, capsys) -> None:
    save_model(network(), tmp_path / "model.pth")
    channels = np.moveaxis(IMAGE, 2, 0)[:2]
    tifffile.imwrite(tmp_path / "a.tif", channels, photometric="minisblack", metadata=None)
    drawn: list[np.ndarray] = []
    monkeypatch.setattr("kg_detectron.report.build.draw_explanation", lambda image, *_: drawn.append(image) or b"")
    command = ["explain", str(tmp_path / "a.tif"), "-m", str(tmp_path / "model.pth"), "-o", str(tmp_path / "a.png")]
    assert main([*command, "--axes", "CYX"]) == 2
    assert "choose one with --channels 1" in capsys.readouterr().err
    assert main([*command, "--axes", "CYX", "--channels", "2", "--scene", "1"]) == 0
    np.testing.assert_array_equal(drawn[0], np.dstack([channels[1]] * 3))


def test_report_shows_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(network(), tmp_path / "model.pth")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "one.png"), IMAGE)
    labels = np.zeros(IMAGE.shape[:2], np.uint8)
    labels[10:50, 20:60] = 1
    cv2.imwrite(str(tmp_path / "labels" / "one.png"), labels)
    paths = [str(tmp_path / "labels")] * 2 + ["--images", str(tmp_path / "images"), "-o", str(tmp_path / "page.html")]
    explained = ["--explain", str(tmp_path / "images" / "one.png"), "--model", str(tmp_path / "model.pth")]
    assert main(["report", *paths, *explained]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "How boxes came about" in text and 'src="data:image/png;base64,' in text
