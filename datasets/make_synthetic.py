"""Make a synthetic dataset in COCO JSON; see README.md beside this file."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from preparation import parser_of, run
from tqdm import trange

from kg_detectron.io.coco import write_split
from kg_detectron.synthetic import CLASSES, classes_image, neural_image, nuclei_image

KINDS = {"nuclei": [nuclei_image], "neural": [neural_image], "both": [nuclei_image, neural_image]}
# What --classes draws: cells of several categories.
WITH_CLASSES = "classes"
SPLITS = ("train", "val")


def make(
    output: Path, *, kind: str, sizes: dict[str, int], size: tuple[int, int], cells: tuple[int, int], seed: int
) -> dict[str, list[int]]:
    """Write ``output/synthetic``.

    An image depends on the seed, its split, its index and what is drawn, and on nothing else: a larger set begins with
    the images of a smaller one.

    Args:
        output: the root of all datasets.
        kind: nuclei, neural, or both, in turn; or classes, cells of the categories `CLASSES`.
        sizes: number of images of each split, ``train`` and ``val``; a split of 0 is not written.
        size: height and width, pixels.
        cells: fewest and most cells of an image; fewer where it has no room for them.
        seed: 0 or more.

    Returns:
        for every split, the number of cells of every image.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= cells[0] <= cells[1]:
        raise ValueError(f"cells must be the fewest and the most, 0 or more, got {cells[0]} {cells[1]}")
    if min(sizes.values()) < 0 or seed < 0:
        raise ValueError(f"numbers of images and the seed must be 0 or more, got {sizes} and {seed}")

    drawn: list[Callable[..., tuple]] = [classes_image] if kind == WITH_CLASSES else [*KINDS[kind]]

    def samples(split: str) -> Iterator[tuple]:
        for index in trange(sizes[split], desc=split, unit="image"):
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            draw = drawn[index % len(drawn)]
            yield f"{index:06d}", *draw(rng, *size, n=int(rng.integers(cells[0], cells[1] + 1)))

    return {
        split: write_split(
            output / "synthetic",
            split,
            samples(split),
            category=CLASSES if kind == WITH_CLASSES else "cell",
            description=f"synthetic cells of kg_detectron, kind {kind}, seed {seed}: {split}",
        )
        for split in sizes
        if sizes[split]
    }


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "synthetic")
    parser.add_argument("--kind", choices=KINDS, default="both", help="what to draw; both, in turn, by default")
    parser.add_argument(
        "--classes", action="store_true", help=f"draw cells of three categories instead: {', '.join(CLASSES)}"
    )
    parser.add_argument("--train", type=int, default=200, help="number of training images (default: 200)")
    parser.add_argument("--val", type=int, default=50, help="number of validation images (default: 50)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(256, 256),
        metavar=("H", "W"),
        help="of an image, pixels (default: 256 256)",
    )
    parser.add_argument(
        "--cells", type=int, nargs=2, default=(5, 30), metavar=("MIN", "MAX"), help="of an image (default: 5 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    args = parser.parse_args(argv)
    run(
        parser,
        args,
        "synthetic",
        lambda: make(
            args.output,
            kind=WITH_CLASSES if args.classes else args.kind,
            sizes={"train": args.train, "val": args.val},
            size=tuple(args.size),
            cells=tuple(args.cells),
            seed=args.seed,
        ),
    )


if __name__ == "__main__":
    main()
