"""What this branch calls of others' work, by the agreed names; on the code of before where that is not merged yet.

To be deleted when it is: `many_files` then imports `open_image` and `find_images` directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

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


__all__ = ["find_images", "open_image"]
