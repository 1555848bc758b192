"""What this branch calls of others' work, by the agreed names; on the code of before where that is not merged yet.

To be deleted when it is: `many_files` then imports `open_image`, `find_images`, `predict` and `load_model` directly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

try:
    from kg_detectron.io.images import open_image
except ImportError:
    import tifffile

    from kg_detectron.io.images import MAX_PIXELS, read_pages

    def open_image(path, *, axes=None, channels=None, scene=None, max_pixels=MAX_PIXELS):  # type: ignore[no-redef]
        numbers = None if channels is None else [int(channel) for channel in channels]
        pages = read_pages(path, axes=axes, channels=numbers, max_pixels=max_pixels)
        lead, shape = "", ()
        if len(pages) > 1:
            with tifffile.TiffFile(path) as file:
                order, sizes = axes or file.series[0].axes, file.series[0].shape
            chosen = [(a, n) for a, n in zip(order, sizes, strict=True) if a not in "YXSC"]
            lead, shape = "".join(a for a, _ in chosen), tuple(n for _, n in chosen)
        made = []
        for index, page in zip(np.ndindex(*shape), pages, strict=True):
            planes = page[..., :1] if page.strides[2] == 0 else page[..., ::-1]
            names = ("1",) if planes.shape[2] == 1 else ("red", "green", "blue")
            made.append(
                SimpleNamespace(
                    pixels=page,
                    planes=np.moveaxis(planes, -1, 0),
                    channel_names=names,
                    position=dict(zip(lead.lower(), index, strict=True)),
                    pixel_size=None,
                )
            )
        return SimpleNamespace(pages=made, pixel_size=None, pixel_size_source=None, notes=(), scenes=("1",))


try:
    from kg_detectron.io.finding import find_images
except ImportError:
    from kg_detectron.io.inputs import Input, find_inputs

    @dataclass(frozen=True)
    class Found:
        inputs: list[Input]
        notes: tuple[str, ...] = ()

        def passed_over_text(self) -> str:
            return ""

    def find_images(inputs: Sequence[str | Path], output: str | Path):  # type: ignore[no-redef]
        items = find_inputs(inputs, output)
        if not any(item.path.exists() or item.path.is_symlink() for item in items):
            raise FileNotFoundError(f"no such file or folder, and no match: {', '.join(map(str, inputs))}")
        return Found(items)


try:
    from kg_detectron.cells import Cells  # type: ignore[attr-defined]  # noqa: F401
    from kg_detectron.cells.separation import separate_cells
    from kg_detectron.inference.predictor import predict

    def threshold_of(model: Any) -> float:
        return float(model.threshold)

    def pixel_size_of(model: Any) -> float | None:
        return model.preprocessing.pixel_size

except ImportError:
    import torch

    from kg_detectron.cells import separation
    from kg_detectron.cells.masks import MaskCrops
    from kg_detectron.inference import predictor, tiling
    from kg_detectron.io.normalisation import Normalisation, NormalisedImage

    @dataclass(frozen=True)
    class Cells:  # type: ignore[no-redef]
        boxes: torch.Tensor
        scores: torch.Tensor
        labels: torch.Tensor
        masks: MaskCrops
        scale: tuple[float, float] = (1.0, 1.0)
        scale_source: str = ""
        notes: tuple[str, ...] = field(default_factory=tuple)

        def __len__(self) -> int:
            return len(self.boxes)

        def __getitem__(self, item: Any) -> Any:
            if isinstance(item, str):
                return getattr(self, item)
            rows = {name: getattr(self, name)[item] for name in ("boxes", "scores", "labels", "masks")}
            return Cells(**rows, scale=self.scale, scale_source=self.scale_source, notes=self.notes)

        def above(self, score: float) -> "Cells":
            return self[self.scores >= score]

    def separate_cells(cells, scratch=None):  # type: ignore[no-redef,misc]
        entries = {name: cells[name] for name in ("boxes", "scores", "labels", "masks")}
        entries = separation.separate_cells(entries, scratch)
        return Cells(**entries, scale=cells.scale, scale_source=cells.scale_source, notes=cells.notes)

    def predict(  # type: ignore[no-redef,misc]
        model,
        image,
        *,
        scale=None,
        diameter=None,
        pixel_size=None,
        normalisation=None,
        tile=1024,
        overlap=256,
        progress: Callable[[int, int], None] | None = None,
    ):
        before = model.normalisation
        model.normalisation = normalisation or before
        try:
            (height, width), trained = image.shape[:2], model.input_size
            if scale == 1 or height > 2 * trained[0] or width > 2 * trained[1]:
                normalised = NormalisedImage(image, Normalisation(model.normalisation, model.percentiles))
                cells = tiling.predict_tiled(model, normalised, tile=tile, overlap=overlap, progress=progress)
                return Cells(**cells, scale_source="given" if scale == 1 else "own pixels")
            cells = predictor.predict(model, image)
            return Cells(**cells, scale=(trained[0] / height, trained[1] / width), scale_source="training size")
        finally:
            model.normalisation = before

    def threshold_of(model: Any) -> float:
        return 0.0

    def pixel_size_of(model: Any) -> float | None:
        return None


__all__ = ["Cells", "find_images", "open_image", "pixel_size_of", "predict", "separate_cells", "threshold_of"]
