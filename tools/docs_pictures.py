"""Make the pictures of the documentation that need nothing but the examples and the kept models.

    python tools/docs_pictures.py                      # all, into docs/pictures
    python tools/docs_pictures.py first_steps -o DIR   # some, elsewhere

``napari`` needs the extra of that name, and a display or ``xvfb-run``. ``comparison.png`` needs DSB2018 and two trained
models: ``python tools/figures.py comparison``, see docs/evaluate.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from kg_detectron.cli.main import main as kg_detectron
from kg_detectron.io.images import read_image, write_png

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
HEIGHT, GAP = 360, 12  # pixels of the panels of first_steps


def first_steps(output: Path) -> None:
    """The overlays that `kg-detectron predict examples` writes, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        assert kg_detectron(["predict", str(EXAMPLES), "-o", folder, "--save", "overlay"]) == 0
        overlays = [read_image(path) for path in sorted(Path(folder).glob("*_overlay.png"))]
    panels = []
    for overlay in overlays:
        size = round(overlay.shape[1] * HEIGHT / overlay.shape[0]), HEIGHT
        panels += [cv2.resize(overlay, size, interpolation=cv2.INTER_AREA), np.full((HEIGHT, GAP, 3), 255, np.uint8)]
    write_png(output, np.hstack(panels[:-1]))


def explained(output: Path) -> None:
    """What `kg-detectron explain` draws of the fluorescence image."""
    assert kg_detectron(["explain", str(EXAMPLES / "fluorescence.png"), "-o", str(output)]) == 0
    with Image.open(output) as picture:  # a quarter of the size, as good to look at
        picture.convert("RGB").quantize(256).save(output, optimize=True)


def napari(output: Path) -> None:
    """The widget with a result, and the numbers of a cell."""
    import napari as viewers
    from qtpy.QtWidgets import QApplication

    from kg_detectron.napari.widget import SegmentCells

    viewer = viewers.Viewer(show=False)
    viewer.window.resize(1250, 900)
    viewer.add_image(read_image(EXAMPLES / "fluorescence.png")[..., ::-1], name="fluorescence", rgb=True)
    widget = SegmentCells(viewer)
    viewer.window.add_dock_widget(widget, name="Segment cells")
    widget.graphs.value = True
    widget.fine_tune.folder.value = Path("/data/corrected")
    assert widget.segment() is not None
    while not widget.segment_button.enabled:
        QApplication.processEvents()
        time.sleep(0.01)
    layer = widget.labels_layer
    assert layer is not None, widget.status.value
    position = tuple(np.argwhere(layer.data == 1).mean(axis=0).round())
    layer.mouse_drag_callbacks[-1](layer, type("Event", (), {"position": position, "view_direction": None})())
    viewer.window.show()  # painted once before it is drawn
    QApplication.processEvents()
    write_png(output, viewer.screenshot(canvas_only=False, flash=False)[..., 2::-1].copy())
    viewer.close()


PICTURES: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (first_steps, explained, napari)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"{', '.join(PICTURES)}; default: all")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "pictures", metavar="DIR")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.pictures if name not in PICTURES]
    if unknown:
        parser.error(f"PICTURE: expected some of {', '.join(PICTURES)}, got {unknown[0]}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.pictures or PICTURES:
        PICTURES[name](options.output / f"{name}.png")


if __name__ == "__main__":
    main()
