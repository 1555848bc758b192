"""Labelled images in memory, and the random samples that are made of them.

H, W: height and width in pixels; M: number of cells.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from kg_detectron.cells import MaskCrops
from kg_detectron.io.coco import decode_mask, entries_of, load_coco, read_json
from kg_detectron.io.dataset_check import Choice, read_pair
from kg_detectron.io.fault import Severity
from kg_detectron.io.images import read_image
from kg_detectron.io.layouts import find_training_pairs
from kg_detectron.io.normalisation import has_finite_value
from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.modeling import Preprocessing
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings, random_colours, random_window
from kg_detectron.training.empty_fields import empty_field
from kg_detectron.training.sampler import Sample
from kg_detectron.training.seeds import generator_of_sample

# Parts of cells that are smaller than this are no targets.
_MIN_SIDE = 2
_MIN_AREA = 8


@dataclass(frozen=True)
class LabelledImage:
    """An image with its cells.

    Attributes:
        name: of the file.
        image: (H, W, 3) uint8 BGR, normalised to 0..255.
        labels: (H, W) uint16, 0 background, 1..M.
        centres: (M, 2) x, y of the cells, pixels.
        diameters: (M,) equivalent-circle diameters 2 sqrt(area / pi), pixels.
        kind: see `kind_of_image`.
        classes: (M,) int64, the class of each, 1..K, or 0 where it is not known; None where none is.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    centres: np.ndarray
    diameters: np.ndarray
    kind: str
    classes: np.ndarray | None = None

    @property
    def diameter(self) -> float | None:
        """Median cell diameter, pixels; None without cells."""
        return float(np.median(self.diameters)) if len(self.diameters) else None


def labelled_image(
    name: str,
    image: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    classes: Sequence[int] | None = None,
) -> LabelledImage:
    """Normalise an image and measure its cells.

    Args:
        name: of the image.
        image: (H, W, 3) BGR of any type.
        labels: (H, W) integers, 0 background.
        preprocessing: of the model; its levels are those of the whole image.
        classes: of the numbers 0, 1, 2, ... of `labels`; that of 0 does not matter.

    Raises:
        ValueError: as `Preprocessing.levels`, or the image has no finite value.
    """
    if not has_finite_value(image):
        raise ValueError("it has no finite value")
    ids, numbers = np.unique(labels, return_inverse=True)
    labels = (numbers.reshape(labels.shape) + (ids[0] != 0)).astype(np.uint16)
    image = np.round(preprocessing.levels(image)(image)).astype(np.uint8)
    count = int(labels.max(initial=0))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, count + 1))).reshape(-1, 2)
    diameters = 2 * np.sqrt(areas / np.pi)
    diameter = float(np.median(diameters)) if count else None
    of_cells = None if classes is None else np.asarray(classes, np.int64)[ids[ids > 0]]
    kind = kind_of_image(image, diameter)
    return LabelledImage(name, image, labels, centres[:, ::-1] + 0.5, diameters, kind, of_cells)


def dataset_classes(images: str | Path) -> tuple[str, ...]:
    """The names of the categories of a COCO JSON that have annotations, by rising id; () of anything else."""
    return tuple(class_counts(images)) if Path(images).suffix.lower() == ".json" else ()


def class_counts(images: str | Path) -> dict[str, int]:
    """The number of annotations of each category of a COCO JSON that has any, by rising id of the category."""
    data = read_json(images, dict)
    annotations, categories = (
        [one for one in entries_of(data, key, []) if isinstance(one, dict)] for key in ("annotations", "categories")
    )
    counts = Counter(id for id in (cell.get("category_id") for cell in annotations) if isinstance(id, int))
    names = {one["id"]: str(one.get("name")) for one in categories if isinstance(one.get("id"), int)}
    return {names[id]: counts[id] for id in sorted(counts.keys() & names.keys())}


def cells_of_classes(images: Sequence[LabelledImage], classes: int) -> list[int]:
    """The number of cells of no known class, and of each of so many classes, in labelled images."""
    known = [image.classes for image in images if image.classes is not None]
    return np.bincount(np.concatenate([*known, np.zeros(0, int)]), minlength=classes + 1).tolist()


def read_labelled_images(
    annotations: str | Path, images: str | Path, preprocessing: Preprocessing, class_names: Sequence[str] = ()
) -> list[LabelledImage]:
    """Read all images of a COCO dataset into memory. Where masks overlap, the later one counts.

    Args:
        annotations: COCO JSON file.
        images: folder of the images.
        preprocessing: of the model.
        class_names: of the classes 1, 2, ...; without any, no class is known. Cells of a dataset of one category, which
            is none of them, have no known class.

    Raises:
        FileNotFoundError, ValueError: as `load_coco` and `read_image`; a category that is none of the classes.
    """
    dataset = load_coco(annotations, images)
    classes = [class_names.index(name) + 1 if name in class_names else 0 for name in dataset.category_names]
    used = {cell["category_id"] for record in dataset.records for cell in record["annotations"]} - {None}
    unknown = [dataset.category_names[index] for index in sorted(used) if not classes[index]]
    if class_names and unknown and len(used) > 1:
        raise ValueError(
            f"{annotations}: its category {unknown[0]!r} is none of the classes of the model: {', '.join(class_names)}"
        )
    return [image_of_record(record, preprocessing, classes) for record in dataset.records]


def image_of_record(
    record: dict[str, Any], preprocessing: Preprocessing, classes: Sequence[int] | None = None
) -> LabelledImage:
    """Read the image of a record of `load_coco`, with its cells, crowds left out.

    Args:
        classes: of each ``category_id``; by default it is the class less 1.

    Raises:
        FileNotFoundError, ValueError: as `read_image`, or the image has another size than the record says.
    """
    file, size = record["file_name"], (record["height"], record["width"])
    image = read_image(file)
    if image.shape[:2] != size:
        raise ValueError(f"{file}: expected {size} pixels (height, width), got {image.shape[:2]}")
    try:
        ids = [None if cell.get("unclassified") else cell["category_id"] for cell in record["annotations"]]
        of_cells = [0 if id is None else id + 1 if classes is None else classes[id] for id in ids]
        return labelled_image(Path(file).name, image, labels_of_record(record), preprocessing, [0, *of_cells])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def labels_of_record(record: dict[str, Any]) -> np.ndarray:
    """The cells of a record of `load_coco` as labels (H, W) int32, crowds left out. Where masks overlap, the later one
    counts."""
    size = record["height"], record["width"]
    labels = np.zeros(size, np.int32)
    for i, cell in enumerate(record["annotations"], start=1):
        if not cell["iscrowd"]:
            labels[decode_mask(cell["segmentation"], *size)] = i
    return labels


def read_dataset(
    images: str | Path,
    masks: str | Path | None,
    preprocessing: Preprocessing,
    layout: str | None = None,
    class_names: Sequence[str] = (),
) -> list[LabelledImage]:
    """Read images and their masks from folders, or a COCO dataset.

    Args:
        images: folder of images, or a COCO JSON, whose images are named from its folder.
        masks: folder of their masks, or of a COCO JSON the folder of its images where that is another one; None where
            one folder holds both.
        preprocessing: of the model.
        layout: as `find_training_pairs` takes it.
        class_names: as `read_labelled_images` takes them; of folders no class is known.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file that cannot be trained on; the message names it.
    """
    images = Path(images)
    if images.suffix.lower() == ".json":
        return read_labelled_images(images, images.parent if masks is None else masks, preprocessing, class_names)
    pairs, faults, layout = find_training_pairs(images, masks, layout)
    result = []
    for pair in pairs:
        content = read_pair(pair, layout, Choice())
        faults += content.faults
        if content.image is None or not content.cells:
            continue
        crops = [crop for cells in content.cells for crop in cells.crops]
        windows = torch.cat([cells.windows for cells in content.cells])
        labels = MaskCrops(crops, windows, content.image.shape[:2]).label_image()
        try:
            result.append(labelled_image(pair.name, content.image, labels, preprocessing))
        except ValueError as error:
            raise ValueError(f"{pair.image}: {error}") from None
    fatal = [fault for fault in faults if fault.severity == Severity.FATAL]
    if fatal:
        raise ValueError(f"{len(fatal)} faults, which kg-detectron check-data lists; the first: {fatal[0]}")
    return result


def kind_of_image(image: np.ndarray, diameter: float | None) -> str:
    """A coarse kind of microscopy, by colours, background and cell size; for balanced sampling and reports.

    Args:
        image: (H, W, 3) uint8, normalised.
        diameter: median cell diameter, pixels.

    Returns:
        "stain on white", "stained tissue", "grey bright" (bright field, phase contrast), "fluorescence small" or
        "fluorescence large".
    """
    channels = image.reshape(-1, 3).astype(np.int16)
    saturation = (channels.max(1) - channels.min(1)).mean()
    background = np.median(channels.min(1))
    if saturation > 8:
        return "stain on white" if background > 170 else "stained tissue"
    if background > 60:
        return "grey bright"
    return "fluorescence large" if (diameter or 0) > 22 else "fluorescence small"


def target_of_labels(labels: np.ndarray, classes: np.ndarray | None = None) -> dict[str, Tensor]:
    """Boxes, masks and classes of a label image.

    Args:
        labels: (H, W) integers, 0 background.
        classes: of the numbers 0, 1, 2, ...; None where none is known.

    Returns:
        ``boxes`` (M, 4) float32 xyxy, x2 and y2 exclusive; ``masks`` (M, H, W) bool; ``labels`` (M,) int64, classes,
        0 where it is not known. Specks are left out.
    """
    boxes, masks, numbers = [], [], []
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        rows, columns = place
        part = labels[place] == number
        if min(part.shape) < _MIN_SIDE or part.sum() < _MIN_AREA:
            continue
        mask = np.zeros(labels.shape, bool)
        mask[place] = part
        boxes.append([columns.start, rows.start, columns.stop, rows.stop])
        masks.append(mask)
        numbers.append(number)
    of_cells = np.zeros(len(numbers), np.int64) if classes is None else classes[numbers]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "masks": torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *labels.shape)),
        "labels": torch.from_numpy(of_cells),
    }


class TrainingSamples(Dataset):
    """Random windows of labelled images. The window depends on the `Sample` only, not on earlier ones.

    Args:
        images: the training set.
        diameter: to which the median cell diameter of an image is brought, pixels of the network's input.
        geometry, colours: of the augmentation.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        diameter: float,
        geometry: GeometrySettings = GeometrySettings(),  # noqa: B008 (frozen)
        colours: ColourSettings = ColourSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.images = images
        self.diameter = diameter
        self.geometry = geometry
        self.colours = colours

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Image (3, w, w) float32 in 0..255 and its target, see `target_of_labels`."""
        generator = generator_of_sample(sample.seed, sample.position)
        return augmented(self.images[sample.index], self.diameter, self.geometry, self.colours, generator)


def augmented(
    source: LabelledImage,
    diameter: float,
    geometry: GeometrySettings,
    colours: ColourSettings,
    generator: np.random.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A random window of a labelled image: (3, w, w) float32 in 0..255, and its target, see `target_of_labels`.

    Args:
        source: the image.
        diameter: to which the median diameter of its cells is brought before the jitter, pixels.
        geometry, colours: of the augmentation.
        generator: source of the randomness.
    """
    if geometry.empty and generator.random() < geometry.empty:
        image = empty_field(geometry.window, generator)
        labels, origin = np.zeros(image.shape[:2], np.int32), np.zeros(1, np.int64)
    else:
        natural = diameter / source.diameter if source.diameter else 1.0
        image, labels, origin = random_window(source.image, source.labels, natural, source.centres, geometry, generator)
    image = random_colours(image, colours, generator)
    classes = None if source.classes is None else np.append(0, source.classes)[origin]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target_of_labels(labels, classes)


def at_natural_scale(source: LabelledImage, diameter: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A whole labelled image whose cells have the median ``diameter``, not augmented, and its target."""
    scale = diameter / source.diameter if source.diameter else 1.0
    size = tuple(max(1, round(side * scale)) for side in source.labels.shape)
    image = resize_image(source.image.astype(np.float32), size)
    classes = None if source.classes is None else np.append(0, source.classes)
    target = target_of_labels(resize_labels(source.labels, size), classes)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target
