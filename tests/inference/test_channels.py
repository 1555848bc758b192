"""Files with several channels that are no colours: the one with the nuclei is found by its name, or by the model."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from builders import tiny_network

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cli import main
from kg_detectron.inference import save_model
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.model_names import model_path
from kg_detectron.inference.predictor import clear_channel
from kg_detectron.inference.run_settings import Settings
from kg_detectron.io.images import ImageChoiceError, open_image, read_image
from kg_detectron.modeling import KeypointGraphNet
from kg_detectron.report import explain_image
from kg_detectron.synthetic import nuclei_image

SIZE = (96, 128)
NUCLEI = nuclei_image(np.random.default_rng(3), 192, 256, 14)[0][..., 0]
FIBRES = np.broadcast_to((255 * np.random.default_rng(4).uniform(0, 1, 33).repeat(8)[:256] ** 3), (192, 256))
FIBRES = FIBRES.astype(np.uint8)


def write(path: Path, channels: list[np.ndarray], names: list[str] | None = None, axes: str = "CYX") -> Path:
    about = {"axes": axes} | ({"Channel": {"Name": names}} if names else {})
    tifffile.imwrite(path, np.stack(channels), metadata=about, photometric="minisblack", ome=True)
    return path


def sure_of(scores: list[float], sides: list[int]) -> KeypointGraphNet:
    """A network that finds five square cells, with a probability and of a size by the level of the image."""
    model = tiny_network(resize="isotropic", diameter=20.0).eval()

    def detect_seen(seen, window=(slice(None), slice(None)), min_score=0.0, function=None):
        number = int(np.asarray(seen.image)[0, 0, 0])
        side = round(sides[number] * seen.scale[0])
        windows = torch.tensor([[4 * i, 0, 4 * i + side, side] for i in range(5)])
        masks = MaskCrops([torch.ones(side, side)] * 5, windows, seen.shape[:2])
        found = torch.full((5,), scores[number])
        return Cells(windows.float(), found, torch.ones(5, dtype=torch.long), masks).above(min_score)

    model.detect_seen = detect_seen
    return model


@pytest.mark.parametrize(
    ("scores", "sides", "expected"),
    [
        ([0.8, 0.9], [20, 20], 2),
        ([0.9, 0.8, 0.3], [20, 20, 20], 1),
        ([0.86, 0.9], [20, 20], None),  # two stains of nuclei
        ([0.9, 0.9], [20, 20], None),
        ([0.8, 0.95], [20, 6], 1),  # a marker of few cells
        ([0.8, 0.79, 0.95], [20, 20, 6], None),
        ([0.93, 0.9], [12, 20], 2),  # a stain of few nuclei, and one of all
        ([0.9, 0.93], [17, 20], None),
        ([0.0, 0.0], [20, 20], 1),  # nothing anywhere
        ([0.0, 0.9, 0.0], [20, 20, 20], 2),
    ],
)
def test_the_channel_of_the_surest_cells_is_taken_where_it_is_clear(scores, sides, expected):
    channels = {n: np.broadcast_to(np.uint8(n - 1), (*SIZE, 3)) for n in range(1, len(scores) + 1)}
    model = sure_of(scores, sides)
    assert clear_channel(model, channels, scale=1.0) == expected
    assert len(set(sides)) > 1 or clear_channel(model, channels) == expected  # at an estimated scale all are as large


def test_channels_may_be_left_open(tmp_path: Path):
    path = write(tmp_path / "a.ome.tif", [FIBRES, NUCLEI])
    with pytest.raises(ImageChoiceError, match="it has 2 channels"):
        open_image(path)
    (page,) = open_image(path, ask=False).pages
    assert page.chosen == ()
    for number, values in ((1, FIBRES), (2, NUCLEI)):
        chosen = page.of_channels((number,))
        assert chosen.chosen == (number,)
        np.testing.assert_array_equal(chosen.pixels, np.repeat(values[..., None], 3, axis=2))
        np.testing.assert_array_equal(chosen.pixels, read_image(path, channels=[number]))
    for channels in ([2], ["2"]):
        assert open_image(path, channels=channels, ask=False).pages[0].chosen == (2,)
    with pytest.raises(ImageChoiceError, match="no channel DAPI"):
        open_image(path, channels=["DAPI"], ask=False)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_option_equals_the_right_channel(place: int, tmp_path: Path):
    channels = [FIBRES, FIBRES.T[:192, :192].repeat(2, 1)[:, :256]]
    channels.insert(place, NUCLEI)
    names = ["phase", "GFP"]
    names.insert(place, "Hoechst 33342")
    named = write(tmp_path / "named.ome.tif", channels, names)
    plain = write(tmp_path / "plain.ome.tif", channels)
    # The first plane of the stack is empty.
    stack = write(tmp_path / "stack.ome.tif", [np.stack([0 * c, c, c]) for c in channels], axes="CZYX")
    command = ["predict", str(plain), "--save", "labels", "-o", str(tmp_path / "right"), "--channels", str(place + 1)]
    assert main(command) == 0
    right = tifffile.imread(tmp_path / "right" / "plain.ome_labels.tif")
    assert right.max() >= 10
    summary = predict_files([named, plain, stack], model_path("nuclei"), tmp_path / "out", Settings(save=("labels",)))
    assert not summary.failed
    by_file = {Path(record.input).name: record for record in summary.done}
    for name, chosen in (
        ("named.ome.tif", "channel Hoechst 33342, by its name"),
        ("plain.ome.tif", f"channel {place + 1}, the model's choice"),
        ("stack.ome.tif", f"channel {place + 1}, the model's choice"),
    ):
        record = by_file[name]
        assert sum(f"Cells were looked for in {chosen}; --channels takes" in note for note in record.notes) == 1
        found = tifffile.imread(tmp_path / "out" / f"{record.name}_labels.tif")
        expected = np.stack([0 * right, right, right]) if name.startswith("stack") else right
        np.testing.assert_array_equal(found, expected)


def test_two_stains_of_nuclei_are_asked_for(tmp_path: Path):
    both = write(tmp_path / "both.ome.tif", [NUCLEI, NUCLEI], ["DAPI", "H2B-RFP"])
    other = write(tmp_path / "other.ome.tif", [NUCLEI, FIBRES], ["DAPI", "lamin"])
    summary = predict_files([both, other], model_path("nuclei"), tmp_path / "out", Settings(save=("labels",)))
    assert [record.error for record in summary.failed] == [
        "it has 2 channels: 1 DAPI, 2 H2B-RFP; choose one with --channels DAPI"
    ]
    (done,) = summary.done
    assert done.cells >= 10


def test_an_explanation_may_take_the_channel_that_a_prediction_takes(tmp_path: Path):
    file = write(tmp_path / "a.ome.tif", [FIBRES[:40, :60], NUCLEI[:40, :60]], ["actin", "DAPI"])
    save_model(tiny_network(size=(32, 48)), tmp_path / "model.pth")
    with pytest.raises(ImageChoiceError, match="choose one with --channels DAPI"):
        explain_image(tmp_path / "model.pth", file)
    asked = explain_image(tmp_path / "model.pth", file, channels=["DAPI"])
    taken = explain_image(tmp_path / "model.pth", file, ask=False)
    assert taken.png == asked.png and taken.text == f"{asked.text} Of channel DAPI, by its name."
