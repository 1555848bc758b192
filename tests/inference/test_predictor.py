"""Model files and prediction with the core alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import drawn_image, tiny_network

from kg_detectron.inference import kept_models, load_model, predict, save_model
from kg_detectron.inference.predictor import NO_VALUE_NOTE
from kg_detectron.io.images import read_image
from kg_detectron.metrics import mask_iou
from kg_detectron.modeling import KeypointGraphNet, Scores

IMAGE = drawn_image(50, 70)
# The first of the models that come with the package.
NUCLEI = next(iter(kept_models()))


def network(**changes) -> KeypointGraphNet:
    return tiny_network(norm="GN", cut_from="s1", size=(32, 48), **changes).eval()


def test_a_saved_model_predicts_the_same(tmp_path):
    model = network()
    save_model(model, tmp_path / "model.pth")
    other = load_model(tmp_path / "model.pth")
    assert other.description() == model.description() and not other.training
    expected, cells = predict(model, IMAGE), predict(other, IMAGE)
    assert len(cells) > 0
    assert torch.equal(cells.boxes, expected.boxes) and cells.masks.rle() == expected.masks.rle()
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("ensemble", [False, True])
def test_an_image_without_a_finite_value_gets_a_note(ensemble):
    image = np.full((50, 70, 3), np.nan, np.float32)
    assert predict(network(), image, ensemble=ensemble).notes == (NO_VALUE_NOTE,)
    image[20, 30] = 0.5
    assert predict(network(), image, ensemble=ensemble).notes == ()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_model_keeps_its_preprocessing_and_its_scores(tmp_path, ending):
    model = network(normalisation="percentile", percentiles=(5.0, 95.0), pixel_size=0.5, diameters=(9.0, 12.0, 15.0))
    model.scores = Scores((0.0, 1.0), (0.1, 0.9), threshold=0.3)
    save_model(model, tmp_path / f"model{ending}")
    other = load_model(tmp_path / f"model{ending}")
    assert other.preprocessing == model.preprocessing and other.scores == model.scores and other.threshold == 0.3
    expected = predict(other, IMAGE)
    assert not torch.equal(expected.scores, predict(network(), IMAGE).scores)
    assert torch.equal(predict(other, (IMAGE.astype(np.float32) - 1000) * 8).scores, expected.scores)


def test_another_normalisation_is_for_one_prediction():
    model = network()
    own_levels, percentiles = predict(model, IMAGE), predict(model, IMAGE, normalisation="percentile")
    assert not torch.equal(own_levels.scores, percentiles.scores)
    assert model.preprocessing.normalisation == "fixed"
    assert torch.equal(percentiles.scores, predict(network(normalisation="percentile"), IMAGE).scores)


@pytest.mark.parametrize("ways", [{}, {"tile": 32, "overlap": 32}, {"ensemble": True}])
def test_a_grey_array_is_a_picture_of_three_equal_channels(ways):
    model, grey = network(), IMAGE[..., 1]
    cells, expected = predict(model, grey, **ways), predict(model, np.repeat(grey[..., None], 3, axis=2), **ways)
    assert len(cells) > 0 and cells.size == grey.shape
    assert torch.equal(cells.scores, expected.scores) and cells.masks.rle() == expected.masks.rle()


@pytest.mark.parametrize("shape", [(3, 50, 70), (50, 70, 4), (2, 50, 70, 3), (0, 70, 3), (0, 70), (70,)])
def test_an_array_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"image: expected shape \(H, W, 3\), BGR, or \(H, W\), grey, got"):
        predict(network(), np.zeros(shape, np.uint8))


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), [[0, 1], [2, 3]], None])
def test_what_is_no_array_is_refused(image):
    expected = rf"image: expected an array .*, got {type(image).__name__}; read_image reads a file"
    with pytest.raises(ValueError, match=expected):
        predict(tiny_network().eval(), image)


@pytest.mark.parametrize("score", [float("nan"), 2, -1])
def test_a_lowest_score_that_is_none_is_refused(score):
    with pytest.raises(ValueError, match=rf"min_score: expected a number of 0\.\.1, got {score}"):
        predict(network(), IMAGE, min_score=score)


@pytest.mark.parametrize(
    ("way", "scale", "source"),
    [
        ({"scale": 1.5}, 32 / 21, "given"),
        ({"diameter": 14.0}, 2.0, "diameter of 14 pixels"),
        ({"pixel_size": 0.25}, 0.5, "pixel size of 0.25 micrometres"),
    ],
)
def test_the_scale_is_told(way, scale, source):
    cells = predict(network(diameter=28.0, pixel_size=0.5), IMAGE, **way)
    assert cells.scale == pytest.approx((scale, scale)) and cells.scale_source == source
    assert cells.size == IMAGE.shape[:2] and len(cells) > 0


def test_a_model_is_loaded_in_the_mode_that_was_asked_for(tmp_path):
    save_model(network(), tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", precision="bfloat16", channels_last=True)
    assert model.precision == "bfloat16" and len(predict(model, IMAGE)) > 0
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="precision"):
        load_model(tmp_path / "model.pth", precision="int8")


@pytest.mark.cuda
def test_gpu_and_cpu_find_the_same(shared):
    """The tolerance that README states, on real images."""
    files = sorted((shared / "dsb2018" / "val").glob("*.png"))[:4]
    on_cpu, on_gpu = (load_model(NUCLEI, device) for device in ("cpu", "cuda"))
    total = agreeing = 0
    for file in files:
        expected, cells = predict(on_cpu, read_image(file)), predict(on_gpu, read_image(file))
        distance = torch.cdist(expected.boxes, cells.boxes.cpu(), p=torch.inf)
        ratio = cells.scores.cpu() / expected.scores[:, None]
        alike = (distance < 0.05) & ((ratio - 1).abs() < 0.01)
        total += max(distance.shape)
        agreeing += int(alike.any(1).sum())
    assert agreeing >= 0.99 * total > 0


def test_results_are_in_the_frame_of_the_image():
    cells = predict(network(), IMAGE)
    assert (cells.boxes >= 0).all() and len(cells) > 0 and cells.size == (50, 70)
    assert (cells.boxes[:, 2] <= 70).all() and (cells.boxes[:, 3] <= 50).all()
    for (x1, y1, x2, y2), window in zip(cells.boxes.tolist(), cells.masks.windows.tolist(), strict=True):
        assert np.abs(np.array([x1, y1, x2, y2]) - window).max() <= 1.5


def test_bad_files_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        load_model(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no model")
    with pytest.raises(ValueError, match="text.pth"):
        load_model(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.pth"):
        load_model(tmp_path / "empty.pth")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not describe"):
        load_model(tmp_path / "other.pth")
    model = network()
    description = model.description()
    torch.save({"model": {}, "kg_detectron": description}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth.*do not fit"):
        load_model(tmp_path / "weights.pth")
    for name, changed, message in (
        ("settings", {"settings": {"colour": 1}}, "unknown settings colour"),
        ("levels", {"settings": {"preprocessing": {"normalisation": "none"}}}, "normalisation.*'none'"),
        ("method", {"method": "no_such"}, "method: expected one of .*'no_such'"),
        ("scores", {"scores": {"threshold": 2.0}}, "threshold"),
        ("nothing", {"method": None, "settings": None}, "do not fit"),
        (
            "download",
            {"settings": {**description["settings"], "backbone": {"backbone_weights": "IMAGENET1K_V1"}}},
            "names weights to download",
        ),
        ("huge", {"settings": {"preprocessing": {"size": [10**6, 10**6]}}}, "size is 1000000 x 1000000 pixels"),
    ):
        torch.save({"model": model.state_dict(), "kg_detectron": description | changed}, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth.*{message}"):
            load_model(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="eval"):
        predict(model.train(), IMAGE)


def empty_fields() -> dict[str, np.ndarray]:
    """Fields without a cell as cameras and files have them."""
    generator = np.random.default_rng(0)
    hot = generator.normal(20, 3, (256, 256))
    hot[generator.random((256, 256)) < 0.001] = 250
    uneven = np.linspace(20, 120, 256)[:, None] + generator.normal(0, 4, (256, 256))
    return {
        "dark": generator.normal(10, 3, (256, 256)).clip(0, 255).astype(np.uint8),
        "12 bits": generator.normal(100, 8, (400, 300)).astype(np.uint16),
        "few photons": generator.poisson(5, (256, 256)).astype(np.uint16),
        "glass": generator.normal((242, 236, 240), 3, (256, 256, 3)).clip(0, 255).astype(np.uint8),
        "hot pixels": hot.clip(0, 255).astype(np.uint8),
        "uneven light": uneven.clip(0, 255).astype(np.uint8),
    }


@pytest.mark.parametrize("name", kept_models())
@pytest.mark.parametrize("field", empty_fields())
def test_kept_models_find_nothing_in_an_empty_field(name, field):
    """With no option: not even where the search for the scale enlarges the noise four times."""
    model = load_model(name)
    assert not len(predict(model, empty_fields()[field]).above(model.threshold))


def test_the_model_that_comes_with_the_project_finds_nuclei(shared):
    model = load_model(NUCLEI)
    assert model.preprocessing.normalisation == "percentile" and model.preprocessing.size == (512, 512)
    cells = predict(model, read_image(shared / "dsb2018" / "val" / "9e4f8ec60a0d622a.png"))
    truths = json.loads((shared / "dsb2018" / "instances_val.json").read_text())
    (image,) = [one["id"] for one in truths["images"] if one["file_name"].endswith("9e4f8ec60a0d622a.png")]
    masks = [one["segmentation"] for one in truths["annotations"] if one["image_id"] == image]
    overlap = mask_iou(cells.above(model.threshold).masks.rle(), masks)
    assert (overlap.max(axis=1) > 0.5).mean() > 0.7 and (overlap.max(axis=0) > 0.5).mean() > 0.6


@pytest.mark.parametrize("ways", [{}, {"tile": 64, "overlap": 64}, {"ensemble": True}])
@pytest.mark.parametrize("ranking", [{}, {"blur_weight": 0.3, "overlap_sigma": 0.1, "part_sigma": 1.0}])
@pytest.mark.parametrize("sizes", [{}, {"side": (4.0, 12.0, 30.0), "log_odds": (-2.0, -0.5, 0.7)}])
def test_a_lowest_score_leaves_the_other_cells_as_they_are(ways, ranking, sizes, monkeypatch):
    """Equal to prediction without one, cut afterwards, though fewer masks are computed."""
    model = tiny_network(resize="isotropic", nms_threshold=0.9, **ranking).eval()
    model.scores = Scores((0.0, 0.5), (0.1, 0.9), **sizes)
    image, segmented = drawn_image(96, 128), []
    segment = model.segmentation.predict_cells

    def counted(maps, boxes, sizes):
        segmented[-1] += sum(map(len, boxes))
        return segment(maps, boxes, sizes)

    monkeypatch.setattr(model.segmentation, "predict_cells", counted)
    segmented.append(0)
    every = predict(model, image, scale=1.0, **ways)
    for share in (0.3, 0.9):
        lowest = float(every.scores.quantile(share))
        segmented.append(0)
        cells, expected = predict(model, image, scale=1.0, min_score=lowest, **ways), every.above(lowest)
        assert 0 < len(cells) < len(every)
        torch.testing.assert_close(cells.scores, expected.scores)
        torch.testing.assert_close(cells.boxes, expected.boxes)
        assert cells.masks.rle() == expected.masks.rle()
    if not ranking and not sizes:  # ranking lowers scores after the masks, and the sizes are those of the masks
        assert (segmented[2] < segmented[0]) == ("ensemble" not in ways)
    assert len(predict(model, image, scale=1.0, min_score=1.0, **ways)) == 0
