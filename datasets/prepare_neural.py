"""Turn images with colour masks (one colour, one cell) into COCO JSON; see README.md beside this file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from preparation import SPLITS, parser_of, run
from tqdm import tqdm

from kg_detectron.io.coco import write_split
from kg_detectron.io.images import read_image
from kg_detectron.io.normalisation import Normalisation

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def colour_masks(picture: np.ndarray) -> list[np.ndarray]:
    """Take a colour mask apart.

    Args:
        picture: (H, W, 3) uint8; one colour is one cell, and grey (three equal channels, black included) is background.

    Returns:
        one (H, W) bool a cell, in the order of the colours' values.
    """
    first, second, third = np.moveaxis(picture.astype(np.int32), 2, 0)
    colour = first << 16 | second << 8 | third
    background = (first == second) & (second == third)
    return [colour == value for value in np.unique(colour[~background])]


def find_pairs(source: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split, sorted, each with its mask, ``mask/<the same name>.png``.

    Raises:
        ValueError: two images of one name.
        FileNotFoundError: no images, or an image has no mask.
    """
    images = sorted(path for path in (source / split).iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise FileNotFoundError(f"{source / split}: there are no images ({', '.join(IMAGE_ENDINGS)}) in it")
    pairs = {}
    for image in images:
        mask = source / "mask" / f"{image.stem}.png"
        if image.stem in pairs:
            raise ValueError(f"{image}: {pairs[image.stem][0].name} has the same name, and so the same mask")
        if not mask.is_file():
            raise FileNotFoundError(f"{image}: its mask {mask} is missing")
        pairs[image.stem] = image, mask
    return list(pairs.values())


def read_pair(image_path: Path, mask_path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Read an image (H, W, 3) BGR and its cells' masks (H, W) bool.

    Raises:
        ValueError: an unreadable file, a mask of another size, or not of 8 bits.
    """
    image, picture = read_image(image_path), read_image(mask_path)
    if picture.dtype != np.uint8:
        raise ValueError(f"{mask_path}: a colour mask must have 8 bits a channel")
    if picture.shape != image.shape:
        raise ValueError(f"{mask_path}: the mask is {picture.shape[:2]}, its image {image.shape[:2]} (height, width)")
    return Normalisation()(image), colour_masks(picture)


def prepare(source: Path, output: Path) -> dict[str, list[int]]:
    """Convert ``source/{train,val,test}`` and ``source/mask`` into ``output/neural``.

    Returns:
        for every split that is there, the number of cells of every image.

    Raises:
        ValueError, FileNotFoundError: anything wrong with the input; the message names the file.
    """
    splits = [split for split in SPLITS if (source / split).is_dir()]
    if not splits:
        raise FileNotFoundError(f"{source}: there is no folder {', '.join(SPLITS)} in it")
    # Before anything is written: a missing mask should not be found after an hour.
    pairs = {split: find_pairs(source, split) for split in splits}

    def samples(split: str) -> Iterator[tuple[str, np.ndarray, list[np.ndarray]]]:
        for image_path, mask_path in tqdm(pairs[split], desc=split, unit="image"):
            yield image_path.stem, *read_pair(image_path, mask_path)

    return {
        split: write_split(
            output / "neural",
            split,
            samples(split),
            category="cell",
            description=f"neural cells, from images with colour masks: {split}",
        )
        for split in splits
    }


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "neural")
    parser.add_argument("source", type=Path, help="folder with train/, val/, test/ (images) and mask/ (colour PNGs)")
    args = parser.parse_args(argv)
    counts = run(parser, args, "neural", lambda: prepare(args.source, args.output))
    for split in SPLITS:
        if split not in counts:
            print(f"{args.source}: no folder {split}, left out")


if __name__ == "__main__":
    main()
