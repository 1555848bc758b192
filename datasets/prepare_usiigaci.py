"""Turn the training data of Usiigaci (phase-contrast cells) into COCO JSON; see README.md beside this file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from preparation import add_splits, draw_splits, parser_of, read_splits, run
from tqdm import tqdm

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io.coco import write_split
from kg_detectron.io.images import read_image
from kg_detectron.io.labels import read_label_image

IMAGE, LABELS = "raw.tif", "instances_ids.png"


def find_sets(source: Path) -> dict[str, Path]:
    """The folders at any depth that hold an image and its labels, by name: set1 is called set01.

    Raises:
        FileNotFoundError: there is none, or an image has no labels.
        ValueError: two folders of one name.
    """
    sets: dict[str, Path] = {}
    for image in sorted(source.rglob(IMAGE)):
        folder = image.parent
        if not (folder / LABELS).is_file():
            raise FileNotFoundError(f"{image}: its labels {folder / LABELS} are missing")
        digits = folder.name.removeprefix("set")
        name = f"set{int(digits):02}" if digits.isdigit() else folder.name
        if name in sets:
            raise ValueError(f"{folder}: {sets[name]} is called {name} too")
        sets[name] = folder
    if not sets:
        raise FileNotFoundError(f"{source}: there are no files setN/{IMAGE} and setN/{LABELS} in it")
    return sets


def read_set(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Read an image, (H, W, 3) of 8 or 16 bits as it is, and its cells' masks, (H, W) bool.

    Raises:
        ValueError: an unreadable file, labels of another size, or an image of another type.
    """
    image, labels = read_image(folder / IMAGE), read_label_image(folder / LABELS)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"{folder / LABELS}: it is {labels.shape}, its image {image.shape[:2]} (height, width)")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{folder / IMAGE}: expected 8 or 16 bits, got {image.dtype}")
    return image, [mask.numpy() for mask in MaskCrops.from_label_image(labels)]


def prepare(source: Path, output: Path, *, split_lists: Path | None = None, seed: int = 0) -> dict[str, list[int]]:
    """Convert the download into ``output/usiigaci``.

    Args:
        source: a folder with setN/raw.tif and setN/instances_ids.png at any depth.
        output: the root of all datasets.
        split_lists: folder of the lists of names (set01); without it, a random split is drawn.
        seed: of the random split.

    Returns:
        for every split, the number of cells of every image.

    Raises:
        ValueError, FileNotFoundError: anything wrong with the input; the message names the file.
    """
    sets = find_sets(source)
    splits = read_splits(split_lists) if split_lists else draw_splits(list(sets), seed)
    missing = [name for names in splits.values() for name in names if name not in sets]
    if missing:
        raise ValueError(f"{source}: {len(missing)} names of the lists in {split_lists} are not in it: {missing}")

    def samples(split: str) -> Iterator[tuple[str, np.ndarray, list[np.ndarray]]]:
        for name in tqdm(splits[split], desc=split, unit="image"):
            yield name, *read_set(sets[name])

    return {
        split: write_split(
            output / "usiigaci",
            split,
            samples(split),
            category="cell",
            description=f"Usiigaci, phase contrast (Tsai et al. 2019, MIT licence): {split}",
        )
        for split in splits
    }


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "usiigaci")
    parser.add_argument("source", type=Path, help=f"folder with setN/{IMAGE} and setN/{LABELS}, at any depth")
    add_splits(parser)
    args = parser.parse_args(argv)
    run(parser, args, "usiigaci", lambda: prepare(args.source, args.output, split_lists=args.splits, seed=args.seed))


if __name__ == "__main__":
    main()
