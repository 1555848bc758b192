"""Stained images are predicted in the view in which the model expects more cells, pictures of several dyes in the one
in which it is surest of them."""

import cv2
import numpy as np
import pytest
import tifffile
import torch
from builders import tiny_network

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.run_lengths import encode_mask
from kg_detectron.cli import main
from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.inference.explanation import explain
from kg_detectron.inference.predictor import HAEMATOXYLIN_NOTE, VIEW_NOTES
from kg_detectron.inference.tile_store import TileStore
from kg_detectron.io.stains import DYES
from kg_detectron.metrics.iou import mask_iou
from kg_detectron.modeling import KeypointGraphNet, Scores
from kg_detectron.modeling.preprocessing import COLOURS, HAEMATOXYLIN, NetworkImage, Preprocessing
from kg_detectron.synthetic import nuclei_image


def section(seed: int = 0, height: int = 160, width: int = 200) -> np.ndarray:
    """Drawn nuclei in haematoxylin, (H, W, 3) uint8, in tissue that is as dark, in eosin."""
    generator = np.random.default_rng(seed)
    image, _ = nuclei_image(generator, height, width, 12)
    nuclei = image[..., 0] / max(1, image.max())
    eosin = generator.uniform(0.0, 1.2, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
    densities = np.stack((nuclei, eosin * (1 - nuclei), np.zeros_like(eosin)), axis=2)
    return (255 * np.exp(-densities @ DYES)).round().astype(np.uint8)


def expecting(view: str) -> KeypointGraphNet:
    """A network that finds cells of 20 pixels, surely in one of the views, and hardly in the other."""
    model = tiny_network(resize="isotropic", diameter=20.0, haematoxylin=True).eval()

    def detect_seen(seen, window=(slice(None), slice(None)), min_score=0.0, function=None):
        side = round(20 * seen.scale[0])
        windows = torch.tensor([[4 * i, 0, 4 * i + side, side] for i in range(5)])
        scores = torch.full((5,), 0.9 if seen.view == view else 0.3)
        masks = MaskCrops([torch.ones(side, side)] * 5, windows, seen.shape[:2])
        return Cells(windows.float(), scores, torch.ones(5, dtype=torch.long), masks).above(min_score)

    model.detect_seen = detect_seen
    return model


@pytest.mark.parametrize("sizes", [{}, {"scale": 1.0}, {"diameter": 20.0}])
@pytest.mark.parametrize("view", [COLOURS, HAEMATOXYLIN])
def test_the_view_of_more_expected_cells_is_taken(view, sizes):
    cells = predict(expecting(view), section(), **sizes)
    assert cells.notes == ((HAEMATOXYLIN_NOTE,) if view == HAEMATOXYLIN else ())
    assert (cells.scores == 0.9).all()


def test_other_images_are_looked_at_once():
    model, image = expecting(HAEMATOXYLIN), section()
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    for other in (grey, 255 - image, grey[..., 0]):
        assert model.network_image(other, scale=1.0)[0].view == COLOURS
    assert model.with_preprocessing(haematoxylin=False).network_image(image, scale=1.0)[0].view == COLOURS


def test_scale_comes_from_the_view_that_shows_cells():
    model = expecting(HAEMATOXYLIN)
    model.scores = Scores(threshold=0.5)
    seen, source = model.network_image(section())
    assert seen.view == HAEMATOXYLIN and source == "estimated from cells of about 23 pixels"


@pytest.mark.parametrize(("nuclei", "view", "diameter"), [(40, HAEMATOXYLIN, 23), (0, COLOURS, 181)])
def test_few_large_things_in_colours_may_be_glands_among_nuclei(nuclei, view, diameter):
    model = tiny_network(resize="isotropic", diameter=20.0, haematoxylin=True).eval()

    def detect_seen(seen, window=(slice(None), slice(None)), min_score=0.0, function=None):
        size, count = (160, 2) if seen.view == COLOURS else (20, nuclei)
        side = round(size * seen.scale[0])
        count = count if 12 <= side <= 50 else 0
        windows = torch.tensor([[4 * i, 0, 4 * i + side, side] for i in range(count)]).reshape(-1, 4)
        masks = MaskCrops([torch.ones(side, side)] * count, windows, seen.shape[:2])
        return Cells(windows.float(), torch.full((count,), 0.9), torch.ones(count, dtype=torch.long), masks)

    model.detect_seen = detect_seen
    seen, source = model.network_image(section(height=500, width=600))
    assert seen.view == view and source == f"estimated from cells of about {diameter} pixels"


@pytest.mark.parametrize("ways", [{"tile": 64, "overlap": 64}, {"ensemble": True}])
def test_tiles_and_mirror_images_get_the_same_view(ways, monkeypatch, tmp_path):
    model, views = expecting(HAEMATOXYLIN), []
    chosen = type(model).network_image

    def network_image(self, image, **arguments):
        seen, source = chosen(self, image, **arguments)
        views.append((arguments["view"], seen.view))
        return seen, source

    monkeypatch.setattr(type(model), "network_image", network_image)
    store = TileStore(tmp_path / "store")
    first = predict(model, section(0, 96, 128), scale=1.0, store=store, **ways)
    assert HAEMATOXYLIN_NOTE in first.notes and {view for _, view in views} == {HAEMATOXYLIN}
    assert sum(asked is None for asked, _ in views) == 1
    views.clear()
    again = predict(model, section(0, 96, 128), scale=1.0, store=store, **ways)
    assert [asked for asked, _ in views] == [HAEMATOXYLIN] * len(views) and again.notes == first.notes
    assert torch.equal(again.boxes, first.boxes) and again.masks.rle() == first.masks.rle()


def test_the_kept_model_sees_nuclei_among_eosin(tmp_path):
    model = load_model("nuclei")
    assert model.preprocessing.haematoxylin
    image = section(height=300, width=400)
    found = predict(model, image, min_score=model.threshold)
    assert HAEMATOXYLIN_NOTE in found.notes
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").preprocessing.haematoxylin
    model.with_preprocessing(enlargement=1.0)
    as_trained = predict(model, image, min_score=model.threshold)
    model.with_preprocessing(haematoxylin=False)
    assert len(as_trained) > len(predict(model, image, min_score=model.threshold))
    in_colours = predict(model.with_preprocessing(enlargement=1.3), image, min_score=model.threshold)
    _, nuclei = nuclei_image(np.random.default_rng(0), 300, 400, 12)
    truth = [encode_mask(mask) for mask in nuclei]
    right, right_in_colours = (
        int((mask_iou(cells.masks.rle(), truth).max(1) >= 0.5).sum()) for cells in (found, in_colours)
    )
    assert right > right_in_colours and right >= 10
    assert right / (len(found) + len(truth)) > right_in_colours / (len(in_colours) + len(truth))


def merged(height: int = 160, width: int = 200, count: int = 12, blue: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Drawn nuclei in one channel, BGR, of (H, W, 3) uint8, with fibres in the others; and their masks."""
    generator = np.random.default_rng(3)
    image, nuclei = nuclei_image(generator, height, width, count)
    across, down = (255 * generator.uniform(0, 1, side // 8 + 1).repeat(8)[:side] ** 3 for side in (height, width))
    channels = [image[..., 0], across[:, None].repeat(width, 1), down[None].repeat(height, 0)]
    return np.stack(channels[-blue:] + channels[:-blue], axis=2).astype(np.uint8), nuclei


def sure_by_view(scores: dict[str, float], areas: dict[str, int] | None = None) -> KeypointGraphNet:
    """A network that finds five cells of 20 pixels or other sides, with a probability by the view."""
    model = tiny_network(resize="isotropic", diameter=20.0, single_colours=True).eval()

    def detect_seen(seen, window=(slice(None), slice(None)), min_score=0.0, function=None):
        side = round((areas or {}).get(seen.view, 20) * seen.scale[0])
        windows = torch.tensor([[4 * i, 0, 4 * i + side, side] for i in range(5)])
        masks = MaskCrops([torch.ones(side, side)] * 5, windows, seen.shape[:2])
        found = torch.full((5,), scores[seen.view])
        return Cells(windows.float(), found, torch.ones(5, dtype=torch.long), masks).above(min_score)

    model.detect_seen = detect_seen
    return model


@pytest.mark.parametrize(
    ("scores", "areas", "expected"),
    [
        ({"colours": 0.6, "blue": 0.9, "green": 0.7, "red": 0.8}, {}, "blue"),
        ({"colours": 0.6, "blue": 0.8, "green": 0.7, "red": 0.9}, {}, "red"),
        ({"colours": 0.9, "blue": 0.8, "green": 0.7, "red": 0.7}, {}, "colours"),
        ({"colours": 0.6, "blue": 0.88, "green": 0.7, "red": 0.9}, {}, "blue"),  # as usual for DNA
        ({"colours": 0.6, "blue": 0.8, "green": 0.7, "red": 0.95}, {"red": 6}, "blue"),  # a marker of few cells
        ({"colours": 0.6, "blue": 0.9, "green": 0.5, "red": 0.5}, {"blue": 8}, "blue"),  # fewer cells, but enough
    ],
)
def test_of_several_dyes_the_surest_view_is_taken(scores, areas, expected):
    model, (image, _) = sure_by_view(scores, areas), merged()
    for sizes in [{"scale": 1.0}, {}][: 1 if areas else 2]:  # at an estimated scale all cells are as large
        cells = predict(model, image, **sizes)
        assert cells.notes == ((VIEW_NOTES[expected],) if expected != COLOURS else ())
        assert cells.scores.numpy() == pytest.approx(scores[expected])
    in_colours = predict(model, image, scale=1.0, single_colours=False)
    assert in_colours.notes == () and in_colours.scores.numpy() == pytest.approx(scores[COLOURS])


def test_a_view_that_was_chosen_is_taken_again():
    """A mirror image is sampled at other pixels, and might be taken for a picture of another kind."""
    preprocessing, stained = Preprocessing(haematoxylin=True, single_colours=True), section()
    assert set(preprocessing.views(merged()[0])) == {COLOURS, "blue", "green", "red"}
    assert set(preprocessing.views(stained)) == {COLOURS, HAEMATOXYLIN}
    for name in (COLOURS, HAEMATOXYLIN, "blue", "green", "red"):
        for image in (stained, 255 - stained):
            assert NetworkImage(image, preprocessing.views(image, name)[name], 1.0).view == name
    with pytest.raises(ValueError, match="view: expected one of .*, got 'purple'"):
        preprocessing.views(stained, "purple")
    with pytest.raises(ValueError, match="view: .* no colours; got haematoxylin"):
        preprocessing.views(np.zeros((8, 8, 3), np.uint8), HAEMATOXYLIN)


def test_an_explanation_shows_the_view_of_the_prediction():
    model, (image, _) = load_model("nuclei"), merged(96, 128, 3, blue=2)
    cells = predict(model, image)
    assert cells.view == "red"
    explained = [explain(model, image, scale=cells.scale[0], view=view) for view in (cells.view, "green")]
    votes = [explanation.scales[0].votes for explanation in explained]
    assert np.array_equal(votes[0], explain(model, image[..., [2, 2, 2]], scale=cells.scale[0]).scales[0].votes)
    assert not np.array_equal(votes[0], votes[1])


def test_without_cells_in_any_colour_the_picture_keeps_its_colours():
    model = tiny_network(resize="isotropic", diameter=20.0, single_colours=True, peak_threshold=1e6).eval()
    cells = predict(model, merged()[0])
    assert len(cells) == 0 and cells.notes == () and cells.scale == (1.0, 1.0)


@pytest.mark.parametrize("channel", [0, 2])
def test_the_kept_model_sees_nuclei_among_other_dyes(channel, tmp_path, capsys):
    image, nuclei = merged(300, 400, 20, channel)
    path, colour = tmp_path / "merged.png", ("blue", "green", "red")[channel]
    assert cv2.imwrite(str(path), image)
    truth, right, notes = [encode_mask(mask) for mask in nuclei], [], []
    for options in ([], ["--channels", str(3 - channel)], ["--channels", "red,green,blue"]):
        command = ["predict", str(path), "-o", str(tmp_path / "out"), "--save", "labels", "--overwrite"]
        assert main([*command, *options]) == 0
        labels = tifffile.imread(tmp_path / "out" / "merged_labels.tif")
        found = [encode_mask(labels == number) for number in np.unique(labels[labels > 0])]
        right.append(int((mask_iou(found, truth).max(1) >= 0.5).sum()) if found else 0)
        notes.append(capsys.readouterr().out)
    assert right[0] == right[1] and right[0] > right[2] and right[0] >= 14
    assert VIEW_NOTES[colour] in notes[0] and "alone, for there" not in notes[1] + notes[2]


@pytest.mark.parametrize("channel", [0, 2])
def test_of_a_picture_of_one_dye_its_colour_alone_is_shown(channel):
    """The others hold noise of two grey levels, which as levels of their own would be as bright."""
    model, generator = load_model("nuclei"), np.random.default_rng(5)
    grey = nuclei_image(generator, 160, 200, 12)[0][..., 0].astype(np.uint8)
    image = generator.integers(0, 3, (160, 200, 3), np.uint8)
    image[..., channel] = grey
    cells, of_grey = (predict(model, one, min_score=model.threshold) for one in (image, grey))
    assert cells.notes == (VIEW_NOTES["blue" if channel == 0 else "red"],)
    assert len(cells) == len(of_grey) > 5 and torch.equal(cells.boxes, of_grey.boxes)
    assert list(Preprocessing(single_colours=True).views(255 - image)) == [COLOURS]  # bright
