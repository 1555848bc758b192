"""Images and the masks that belong to them, by their file names."""

from dataclasses import dataclass
from pathlib import Path

from kg_detectron.io.cell_sets import IMAGE_SUFFIXES, LABELS_ENDING
from kg_detectron.io.fault import NO_PARTNER, Fault

LAYOUTS = ("labels", "cells")


@dataclass(frozen=True)
class Pair:
    """An image and its label image, or the files of its cells, one each. `name` is the image's, with its folder."""

    name: str
    image: Path
    masks: list[Path]


def find_pairs(images: str | Path, masks: str | Path, layout: str | None = None) -> tuple[list[Pair], list[Fault], str]:
    """Find the masks of every image.

    Args:
        images: folder of the images, ``NAME.png`` (or .jpg, .tif), at any depth.
        masks: folder of the masks, with the same folders in it.
        layout: ``labels``: one label image an image, ``NAME.tif`` or ``NAME_labels.tif`` (or .png). ``cells``: one file
            a cell, ``NAME/*.png``; where `images` and `masks` are one folder, ``NAME/images/*.png`` and
            ``NAME/masks/*.png``, as in the 2018 Data Science Bowl. None takes what is there.

    Returns:
        The pairs by name, what has no partner, and the layout.

    Raises:
        FileNotFoundError: a folder, or any image in it, is missing.
        ValueError: another layout, or label images in the folder of their images.
    """
    images, masks = Path(images), Path(masks)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if images.resolve() == masks.resolve():
        if layout == "labels":
            raise ValueError(f"layout: label images must be in another folder than their images, {images}")
        layout = "cells"
        found, owned = _grouped(images, "images"), _grouped(masks, "masks")
    else:
        found = _named(images)
        layout = layout or ("cells" if any((masks / name).is_dir() for name in found) else "labels")
        owned = _grouped(masks, None) if layout == "cells" else _named(masks)
    if not found:
        raise FileNotFoundError(f"{images}: there is no image ({', '.join(IMAGE_SUFFIXES)}) in it")

    pairs, faults = [], []
    for name in sorted(found.keys() | owned.keys()):
        own_images, own_masks = found.get(name, []), owned.get(name, [])
        if not own_images:
            faults.append(Fault(NO_PARTNER, str(own_masks[0]), f"there is no image {name} in {images}"))
        elif not own_masks:
            faults.append(Fault(NO_PARTNER, str(own_images[0]), f"there are no masks of it in {masks}"))
        elif len(own_images) > 1 or layout == "labels" and len(own_masks) > 1:
            files = own_images if len(own_images) > 1 else own_masks
            faults.append(Fault(NO_PARTNER, str(files[0]), f"{files[1].name} has the same name, expected one file"))
        else:
            pairs.append(Pair(name, own_images[0], own_masks))
    return pairs, faults, layout


def _files(folder: Path) -> list[Path]:
    # Archives made on a Mac hold a "._x.png" of another kind for every x.png.
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _named(folder: Path) -> dict[str, list[Path]]:
    """Files by their path in the folder, without ending."""
    named: dict[str, list[Path]] = {}
    for file in _files(folder):
        name = file.relative_to(folder).with_suffix("").as_posix().removesuffix(LABELS_ENDING)
        named.setdefault(name, []).append(file)
    return named


def _grouped(folder: Path, inner: str | None) -> dict[str, list[Path]]:
    """Files by the folder that they are in, or by the one around it where theirs is called `inner`; others are left."""
    grouped: dict[str, list[Path]] = {}
    for file in _files(folder):
        parts = file.relative_to(folder).parent.parts
        if inner and parts[-1:] == (inner,):
            parts = parts[:-1]
        elif inner:
            continue
        if parts:
            grouped.setdefault("/".join(parts), []).append(file)
    return grouped
