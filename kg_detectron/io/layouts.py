"""Folders of images and masks as StarDist, Cellpose and others lay them out, on top of `find_pairs`."""

from collections.abc import Iterator
from pathlib import Path

from kg_detectron.io.cell_sets import LABELS_ENDING
from kg_detectron.io.fault import NO_PARTNER, Fault
from kg_detectron.io.finding import Pair, files_of_images, find_pairs

# Of names before the suffix. Cellpose calls an image x.tif or x_img.tif and its masks x_masks.tif or x_cp_masks.tif.
_IMAGE_ENDINGS = ("_img", "_image")
_MASK_ENDINGS = ("_cp_masks", "_masks", "_mask", "_label", LABELS_ENDING)
_OTHER_ENDINGS = ("_flows", "_cp_flows", "_outlines", "_cp_outlines", "_cp_output", "_overlay")  # made by programs


def find_training_pairs(
    images: str | Path, masks: str | Path | None, layout: str | None = None
) -> tuple[list[Pair], list[Fault], str]:
    """Find the masks of every image.

    Args:
        images: folder of the images.
        masks: folder of the masks. Where it is the folder of the images, or None, that folder holds, the first that
            there is: ``NAME/images/*`` and ``NAME/masks/*``, a file a cell, as the 2018 Data Science Bowl has it;
            folders ``images`` and ``masks``, as StarDist has it; ``NAME.tif`` or ``NAME_img.tif`` with
            ``NAME_masks.tif``, as Cellpose has it.
        layout: as `find_pairs` takes it. Of two folders, names may also end as Cellpose's do.

    Returns:
        The pairs by name, what has no partner, and the layout.

    Raises:
        FileNotFoundError, ValueError: as `find_pairs` does.
    """
    images = Path(images)
    is_one = masks is None or images.resolve() == Path(masks).resolve()
    if is_one and layout != "labels" and images.is_dir() and any(images.glob("*/**/masks")):
        return find_pairs(images, images, layout)
    if is_one and (images / "images").is_dir() and (images / "masks").is_dir():
        return find_pairs(images / "images", images / "masks", layout)
    if masks is not None and not is_one:
        pairs, faults, found_layout = find_pairs(images, masks, layout)
        if pairs or found_layout == "cells":
            return pairs, faults, found_layout
        by_ending = _by_endings(images, Path(masks))
        return (*by_ending, "labels") if by_ending[0] else (pairs, faults, found_layout)
    pairs, faults = _by_endings(images, images) if images.is_dir() and layout != "cells" else ([], [])
    if pairs:
        return pairs, faults, "labels"
    if masks is None:
        raise ValueError(
            f"{images}: expected a second folder, of the masks, or one folder with NAME.tif and NAME_masks.tif, with "
            "folders images and masks, or with NAME/images/* and NAME/masks/*"
        )
    return find_pairs(images, masks, layout)  # which says what is wrong


def _by_endings(images: Path, masks: Path) -> tuple[list[Pair], list[Fault]]:
    """Images and label images by names with Cellpose's endings."""
    image_files: dict[str, list[Path]] = {}
    mask_files: dict[str, list[Path]] = {}
    for file, name in _files(images, masks):
        base, ending = _split(name, (*_MASK_ENDINGS, *_OTHER_ENDINGS))
        if not ending:
            image_files.setdefault(_split(base, _IMAGE_ENDINGS)[0], []).append(file)
    for file, name in _files(masks, images):
        base, ending = _split(name, _MASK_ENDINGS)
        if ending or images.resolve() != masks.resolve():
            mask_files.setdefault(_split(base, _IMAGE_ENDINGS)[0], []).append(file)
    pairs, faults = [], []
    for name in sorted(image_files.keys() | mask_files.keys()):
        one, other = image_files.get(name, []), mask_files.get(name, [])
        if not one:
            faults.append(Fault(NO_PARTNER, str(other[0]), f"there is no image {name} in {images}"))
        elif not other:
            faults.append(Fault(NO_PARTNER, str(one[0]), f"there are no masks of it in {masks}"))
        elif len(one) > 1 or len(other) > 1:
            files = one if len(one) > 1 else other
            faults.append(Fault(NO_PARTNER, str(files[0]), f"{files[1].name} has the same name, expected one file"))
        else:
            pairs.append(Pair(name, one[0], other))
    return pairs, faults


def _files(folder: Path, apart: Path) -> Iterator[tuple[Path, str]]:
    """The files of `files_of_images`, each with its path in the folder, without ending."""
    for file in files_of_images(folder, apart):
        yield file, file.relative_to(folder).with_suffix("").as_posix()


def _split(name: str, endings: tuple[str, ...]) -> tuple[str, str]:
    """A name without the first of the endings that it has, and that ending, or ""."""
    ending = next((one for one in endings if name.lower().endswith(one) and len(name) > len(one)), "")
    return name.removesuffix(name[len(name) - len(ending) :]) if ending else name, ending
