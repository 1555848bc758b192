"""Turn the 2018 Data Science Bowl's download (stage1_train) into COCO JSON; see README.md beside this file."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from preparation import add_splits, draw_splits, parser_of, read_splits, run
from tqdm import tqdm

from kg_detectron.io import fault
from kg_detectron.io.cell_files import cell_mask
from kg_detectron.io.coco import write_split
from kg_detectron.io.images import decode_image
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.relative_path import checked_relative_path

MAX_BYTES = 2**30  # of a file in a zip file, above which its header is not believed


@dataclass
class Sample:
    """The files of one id, by their names in the download."""

    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)


@contextmanager
def open_download(source: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Open a folder or a zip file: its files' names, relative and sorted, and a function that reads one of them.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: not a folder or sound zip file, or a name in it is absolute or has '..'.
    """
    if source.is_dir():
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        yield names, lambda name: (source / name).read_bytes()
        return
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or zip file")
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source}: neither a folder nor a sound zip file: {error}") from error
    with archive:
        names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
        try:
            for name in names:
                checked_relative_path(name)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

        def read(name: str) -> bytes:
            try:
                size = archive.getinfo(name).file_size  # more than that is not unpacked
                if size > MAX_BYTES:
                    raise ValueError(f"it unpacks to {size} bytes, more than the limit of {MAX_BYTES}")
                return archive.read(name)
            # Each kind of compression has errors of its own.
            except Exception as error:
                raise ValueError(f"{source}: {name}: {error}") from error

        yield names, read


def find_samples(names: list[str]) -> dict[str, Sample]:
    """Group files by the pattern ``<id>/images/*.png``, ``<id>/masks/*.png``, at any depth, by id."""
    samples: dict[str, Sample] = {}
    for name in names:
        parts = name.split("/")
        # Archives made on a Mac hold a "._x.png" of another kind for every x.png.
        if len(parts) < 3 or not name.lower().endswith(".png") or parts[-1].startswith("."):
            continue
        id, kind = parts[-3:-1]
        if kind == "images":
            samples.setdefault(id, Sample()).images.append(name)
        elif kind == "masks":
            samples.setdefault(id, Sample()).masks.append(name)
    return samples


def read_sample(name: str, sample: Sample, read: Callable[[str], bytes]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Read one id: image (H, W, 3) BGR and masks (H, W) bool in the order of their file names.

    Raises:
        ValueError: not one image, no masks, a mask of another size or empty, an unreadable file.
    """
    if len(sample.images) != 1:
        raise ValueError(f"{name}: expected one image in {name}/images, got {len(sample.images)}")
    if not sample.masks:
        raise ValueError(f"{name}: there are no masks in {name}/masks")
    image = Normalisation()(decode_image(read(sample.images[0]), sample.images[0]))
    masks = []
    for mask_name in sample.masks:
        mask, wrong = cell_mask(decode_image(read(mask_name), mask_name))
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{mask_name}: the mask is {mask.shape}, its image {image.shape[:2]} (height, width)")
        if wrong is not None and wrong[0] == fault.NO_CELL:
            raise ValueError(f"{mask_name}: the mask is empty")
        if wrong is not None and wrong[0] in (fault.INVERTED, fault.NO_MASK):
            raise ValueError(f"{mask_name}: {wrong[1]}")
        masks.append(mask)
    return image, masks


def prepare(
    source: Path, output: Path, *, split_lists: Path | None = None, seed: int = 0, allow_missing: bool = False
) -> dict[str, list[int]]:
    """Convert the download into ``output/dsb2018``.

    Args:
        source: folder or zip file of the download.
        output: the root of all datasets.
        split_lists: folder of the lists of ids; without it, a random split is drawn.
        seed: of the random split.
        allow_missing: go on without ids that are in the lists and not in the download.

    Returns:
        for every split, the number of cells of every image.

    Raises:
        ValueError, FileNotFoundError: anything wrong with the input; the message names the file.
    """
    with open_download(source) as (names, read):
        samples = find_samples(names)
        if not samples:
            raise ValueError(f"{source}: there are no files <id>/images/<id>.png and <id>/masks/*.png in it")
        splits = read_splits(split_lists) if split_lists else draw_splits(list(samples), seed)
        missing = [id for ids in splits.values() for id in ids if id not in samples]
        if missing and not allow_missing:
            raise ValueError(
                f"{source}: {len(missing)} ids of the lists in {split_lists} are not in the download "
                f"(--allow-missing goes on without them):\n" + "\n".join(missing)
            )
        if missing:
            print(f"{len(missing)} ids of the lists are not in the download")
        unused = len(samples) + len(missing) - sum(map(len, splits.values()))
        if unused:
            print(f"{unused} ids of the download are in no list")

        counts = {}
        for split, ids in splits.items():
            present = [id for id in ids if id in samples]
            counts[split] = write_split(
                output / "dsb2018",
                split,
                ((id, *read_sample(id, samples[id], read)) for id in tqdm(present, desc=split, unit="image")),
                category="nucleus",
                description=f"2018 Data Science Bowl, stage1_train (CC0 1.0), original masks: {split}",
            )
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "dsb2018")
    parser.add_argument("source", type=Path, help="folder or zip file of stage1_train: <id>/images, <id>/masks")
    add_splits(parser)
    parser.add_argument("--allow-missing", action="store_true", help="go on where listed ids are not in the download")
    args = parser.parse_args(argv)
    run(
        parser,
        args,
        "dsb2018",
        lambda: prepare(
            args.source, args.output, split_lists=args.splits, seed=args.seed, allow_missing=args.allow_missing
        ),
    )


if __name__ == "__main__":
    main()
