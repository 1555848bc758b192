"""Finding files: the images that a command is given, and images with the masks that belong to them."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kg_detectron.io.fault import NO_PARTNER, Fault
from kg_detectron.io.images import IMAGE_SUFFIXES
from kg_detectron.io.microscope import READERS, advice, is_installed
from kg_detectron.io.ome_zarr import ZARR, images_of, is_ome_zarr, name_of

LAYOUTS = ("labels", "cells")
_STORES = (ZARR, ".n5")  # endings of folders that hold an image

_MASK_ENDINGS = ("_labels", "_masks", "_mask")  # of the names of label images, before the suffix
_IMAGE_ENDING = "_img"  # of the names of images beside them, as Cellpose has it
_SHOWN = ", ".join(IMAGE_SUFFIXES)


class Input(NamedTuple):
    """An image and what its results are called: a path without ending, relative to the folder of results."""

    path: Path
    name: str


@dataclass(frozen=True)
class Found:
    """The images that a command was given.

    Attributes:
        inputs: each once, in the order in which they were given, sorted within a folder or pattern.
        passed_over: how many files of given folders were not taken, by ending, such as {".txt": 3, "": 1}.
        notes: what was assumed, a sentence each.
    """

    inputs: list[Input]
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def passed_over_text(self) -> str:
        """One line on the files that were not taken; empty where there are none."""
        count = sum(self.passed_over.values())
        return f"{count} file{'s' * (count != 1)} passed over: {_counted(self.passed_over)}" if count else ""


def find_inputs(inputs: Sequence[str | Path], output: str | Path) -> list[Input]:
    """The images that :func:`find_images` finds."""
    return find_images(inputs, output).inputs


def find_images(inputs: Sequence[str | Path], output: str | Path) -> Found:
    """Find all images, each once.

    Of a folder, the image files directly in it are taken; where there is none, those in its subfolders, and results
    keep the subfolders. Of a pattern with ``*``, ``?``, ``[...]`` or ``**``, all files that match; where it names no
    ending, such as ``tree/**/*``, the image files among them. Results of a pattern keep the folders below its fixed
    part: ``plates/*/image.tif`` gives ``well1/image``. A plate of OME-Zarr stands for all fields of all wells, with
    results such as ``plate/A/1/0``. Hidden files are left out, and the results of earlier runs in
    `output`. Images that differ in their ending alone have it in the names of their results: ``a_tif``, ``a_png``.

    What does not exist, or holds no image, stays as it is, to be missed when it is read, unless it is all there is.

    Args:
        inputs: files, folders and patterns.
        output: folder of the results.

    Raises:
        FileNotFoundError: there is no image at all.
        ValueError: no inputs; two images whose results would have the same name; results beside their image, where the
            next run would take them for images.
    """
    if not inputs:
        raise ValueError("inputs: expected at least one file, folder or pattern")
    output = Path(os.path.abspath(output))
    items: dict[Path, Input] = {}
    passed_over: Counter[str] = Counter()
    notes: list[str] = []
    problems: list[str] = []
    for given in inputs:
        part = _expand(os.fspath(given), output)
        passed_over.update(part.passed_over)
        notes += part.notes
        problems += [part.problem] if part.problem else []
        for path in part.paths:
            for image in images_of(path) if path.is_dir() and is_ome_zarr(path) else (path,):
                name = image.relative_to(part.root)
                text = name_of(name.as_posix()) if is_ome_zarr(image) else ""
                name = name.with_suffix("") if _is_image(path) and not text else name
                items.setdefault(image, Input(image, text or name.as_posix()))
    if len(problems) == len(inputs):
        raise FileNotFoundError("; ".join(problems))
    named, renamed = _distinct_names(list(items.values()))
    for item in named:
        if (output / item.name).parent == item.path.parent:
            raise ValueError(f"{item.path}: its results would lie beside it in {output}; choose another output folder")
    return Found(named, dict(sorted(passed_over.items())), (*notes, *renamed))


@dataclass(frozen=True)
class _Part:
    """What one file, folder or pattern stands for; `root` is the folder from which the names of results start."""

    root: Path
    paths: list[Path]
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    problem: str = ""


def _expand(given: str, output: Path) -> _Part:
    path = Path(os.path.abspath(given))
    if path.is_dir():
        return _folder(given, path, output)
    if os.path.lexists(path):
        return _Part(path.parent, [path])
    if not glob.has_magic(given):
        return _Part(path.parent, [path], problem=f"{given}: there is no such file or folder")
    root, pattern = _pattern(path)
    matching = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    matching = [match for match in matching if not _is_within(match, root, output)]
    # A pattern without ending, such as tree/**/*, means the images.
    if not Path(path.name).suffix.strip(".*?"):
        files = [match for match in matching if not match.is_dir()]
        images = [file for file in files if _is_image(file)]
        passed_over = Counter(file.suffix.lower() for file in files if not _is_image(file))
    else:
        images = [match for match in matching if not match.is_dir() or _is_image(match) or is_ome_zarr(match)]
        passed_over = Counter()
    if images:
        return _Part(root, images, passed_over)
    problem = f"no image matches it; it was looked for in {root}"
    if matching:
        problem = f"no image matches it, only {_counted(passed_over) or 'folders'}"
    return _Part(path.parent, [path], problem=f"{given}: {problem}")


def _folder(given: str, folder: Path, output: Path) -> _Part:
    def listed(paths: Iterable[Path]) -> tuple[list[Path], Counter[str]]:
        kept = [path for path in sorted(paths) if not _is_within(path, folder, output)]
        images = [path for path in kept if _is_image(path)]
        others = Counter(_ending(path) for path in kept if not _is_image(path) and _is_file(path))
        return images, others

    if is_installed(ZARR) and (is_ome_zarr(folder) or folder.suffix.lower() == ZARR):
        return _Part(folder.parent, [folder])
    if advice(folder.suffix) is not None:  # a Zarr
        return _Part(folder.parent, [folder], problem=f"{given}: {advice(folder.suffix)}")
    images, others = listed(path for path in folder.iterdir() if not path.name.startswith("."))
    if images:
        return _Part(folder, images, others)
    images, others = listed(_files_below(folder))
    if images:
        count = f"{len(images)} image{'s' * (len(images) != 1)}"
        return _Part(
            folder, images, others, (f"{given}: no image lies directly in it; took {count} in its subfolders",)
        )
    if others:
        ways = [text for ending in others if (text := advice(ending))]
        text = f"there is no image in it or its subfolders, only {_counted(others, hints=False)}"
        text += "; " + "; ".join(ways) if ways else f" (images end in {_SHOWN})"
    else:
        text = f"the folder is empty, expected images ({_SHOWN})"
    return _Part(folder.parent, [folder], problem=f"{given}: {text}")


def _pattern(path: Path) -> tuple[Path, str]:
    """The fixed folder of a pattern, and the pattern with the signs escaped that are a part of a folder's name."""
    fixed = Path(path.anchor)
    parts = path.relative_to(fixed).parts
    for index, part in enumerate(parts[:-1]):
        if glob.has_magic(part) and not (fixed / part).is_dir():
            return fixed, os.path.join(glob.escape(str(fixed)), *parts[index:])
        fixed /= part
    return fixed, os.path.join(glob.escape(str(fixed)), parts[-1])


def _is_within(path: Path, root: Path, output: Path) -> bool:
    """Whether a path is of the results that lie below the folder that is looked through."""
    return root != output and root in output.parents and (output in path.parents or path == output)


def _is_image(path: Path) -> bool:
    ending = path.suffix.lower()
    return ending in IMAGE_SUFFIXES or is_installed(ending)


def _is_file(path: Path) -> bool:
    return not path.is_dir() or _is_store(path)


def _is_store(path: Path) -> bool:
    """Whether a folder is one image or plate to the user."""
    return path.suffix.lower() in _STORES


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _files_below(folder: Path) -> Iterator[Path]:
    """All files that are not hidden; Zarr folders count as files."""
    for place, folders, files in os.walk(folder):
        zarrs = [name for name in folders if _is_store(Path(name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in zarrs]
        yield from (Path(place, name) for name in (*files, *zarrs) if not name.startswith("."))


def _counted(endings: dict[str, int], *, hints: bool = True) -> str:
    """ "3 .txt, 2 .czi (pip install ...), 1 without ending"."""
    parts = []
    for ending, count in sorted(endings.items(), key=lambda item: (-item[1], item[0])):
        way = advice(ending) if hints and ending in READERS else None
        parts.append(f"{count} {ending or 'without ending'}" + (f" ({way})" if way else ""))
    return ", ".join(parts)


def _distinct_names(items: list[Input]) -> tuple[list[Input], list[str]]:
    """Inputs whose results do not clash: those that differ in their endings alone get them into their names."""
    same: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        same.setdefault(item.name.casefold(), []).append(index)
    notes = []
    for indices in same.values():
        clashing = [items[index] for index in indices]
        if len(clashing) == 1 or len({item.path.parent for item in clashing}) > 1:
            continue
        for index in indices:
            path, name = items[index]
            items[index] = Input(path, f"{name}_{path.suffix[1:]}" if _is_image(path) and path.suffix else name)
        names = [f"{item.path.name} -> {items[index].name}" for item, index in zip(clashing, indices, strict=True)]
        notes.append(f"images of one name have their endings in the names of their results: {', '.join(names)}")
    owners: dict[str, Input] = {}
    for item in items:
        other = owners.setdefault(item.name.casefold(), item)
        if other is not item:
            raise ValueError(
                f"{other.path} and {item.path} would have the same names of results, {item.name}: "
                "give them output folders of their own, or name their common folder by a pattern, "
                f'"{os.path.commonpath([other.path.parent, item.path.parent])}/**/*"'
            )
    return items, notes


# Images and masks


@dataclass(frozen=True)
class Pair:
    """An image and its label image, or the files of its cells, one each. `name` is the image's, with its folder."""

    name: str
    image: Path
    masks: list[Path]


def find_pairs(images: str | Path, masks: str | Path, layout: str | None = None) -> tuple[list[Pair], list[Fault], str]:
    """Find the masks of every image.

    Args:
        images: folder of the images, ``NAME.png`` (or .jpg, .tif, ...), at any depth.
        masks: folder of the masks, with the same folders in it. One of the two may lie in the other, which is then
            looked through without it.
        layout: ``labels``: one label image an image, ``NAME.tif``, ``NAME_labels.tif`` or ``NAME_masks.tif`` (or .png);
            where `images` and `masks` are one folder, ``NAME_masks.tif`` beside ``NAME.tif`` or ``NAME_img.tif``.
            ``cells``: one file a cell, ``NAME/*.png``; where `images` and `masks` are one folder,
            ``NAME/images/*.png`` and ``NAME/masks/*.png``, as in the 2018 Data Science Bowl. None takes what is there.

    Returns:
        The pairs by name, what has no partner, and the layout.

    Raises:
        FileNotFoundError: a folder, or any image in it, is missing.
        ValueError: another layout, or label images that cannot be told from their images.
    """
    images, masks = Path(images), Path(masks)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    image_files: dict[str, list[Path]]
    if images.resolve() == masks.resolve():
        files = files_of_images(images)
        beside = [file for file in files if _mask_name(file.stem) != file.stem]
        image_files = _grouped(images, "images")
        if layout != "cells" and beside and not image_files:
            layout = "labels"
            image_files = _named(images, [file for file in files if file not in beside], lambda stem: stem)
            mask_files = _named(masks, beside, _mask_name)
        elif layout == "labels":
            raise ValueError(
                f"layout: label images must be in another folder than their images, {images}, "
                "or be called NAME_masks.tif beside NAME.tif"
            )
        elif files and not image_files:
            raise FileNotFoundError(
                f"{images}: there is no image in a folder NAME/images, as one folder for images and masks has them, "
                f"but {len(files)} elsewhere: put the masks into a folder of their own, "
                "or call label images NAME_masks.tif beside NAME.tif"
            )
        else:
            layout, mask_files = "cells", _grouped(masks, "masks")
    else:
        image_files = _named(images, files_of_images(images, masks), lambda stem: stem)
        layout = layout or ("cells" if any((masks / name).is_dir() for name in image_files) else "labels")
        mask_files = (
            _grouped(masks, None, images)
            if layout == "cells"
            else _named(masks, files_of_images(masks, images), _mask_name, image_files)
        )
    if not image_files:
        raise FileNotFoundError(f"{images}: there is no image ({_SHOWN}) in it")
    for name in list(image_files):
        bare = name.removesuffix(_IMAGE_ENDING)
        if name not in mask_files and bare in mask_files and bare not in image_files:
            image_files[bare] = image_files.pop(name)

    pairs, faults = [], []
    for name in sorted(image_files.keys() | mask_files.keys()):
        images_of_name, masks_of_name = image_files.get(name, []), mask_files.get(name, [])
        if not images_of_name:
            faults.append(Fault(NO_PARTNER, str(masks_of_name[0]), f"there is no image {name} in {images}"))
        elif not masks_of_name:
            faults.append(Fault(NO_PARTNER, str(images_of_name[0]), f"there are no masks of it in {masks}"))
        elif len(images_of_name) > 1 or layout == "labels" and len(masks_of_name) > 1:
            files = images_of_name if len(images_of_name) > 1 else masks_of_name
            faults.append(Fault(NO_PARTNER, str(files[0]), f"{files[1].name} has the same name, expected one file"))
        else:
            pairs.append(Pair(name, images_of_name[0], masks_of_name))
    return pairs, faults, layout


def files_of_images(folder: Path, apart: Path | None = None) -> list[Path]:
    """Image files in a folder, at any depth, by name; where ``apart`` is a folder below it, without those in there."""
    inner = None if apart is None or folder.resolve() not in apart.resolve().parents else apart.resolve()
    # Archives made on a Mac hold a "._x.png" of another kind for every x.png.
    files = (
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    return sorted(file for file in files if inner is None or not file.parent.resolve().is_relative_to(inner))


def _mask_name(stem: str) -> str:
    """What a label image and its image have in common."""
    ending = next((ending for ending in _MASK_ENDINGS if stem.endswith(ending)), "")
    return stem.removesuffix(ending)


def _named(
    folder: Path, files: Iterable[Path], rename: Callable[[str], str], known: Iterable[str] = ()
) -> dict[str, list[Path]]:
    """Files by their path in the folder, without ending and renamed, unless they are among the known names as it is."""
    named: dict[str, list[Path]] = {}
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        named.setdefault(name if name in known else rename(name), []).append(file)
    return named


def _grouped(folder: Path, inner: str | None, apart: Path | None = None) -> dict[str, list[Path]]:
    """Files by the folder that they are in, or by the one around it where theirs is called `inner`; others are left,
    and those in `apart`."""
    grouped: dict[str, list[Path]] = {}
    for file in files_of_images(folder, apart):
        parts = file.relative_to(folder).parent.parts
        if inner and parts[-1:] == (inner,):
            parts = parts[:-1]
        elif inner:
            continue
        if parts:
            grouped.setdefault("/".join(parts), []).append(file)
    return grouped
