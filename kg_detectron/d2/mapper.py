"""From a record of a dataset to what the models take.

H, W: height and width in pixels; N counts cells.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from scipy import ndimage

from kg_detectron.cells.run_lengths import decode_runs, foreground
from kg_detectron.d2.augmentation import build_augmentations
from kg_detectron.d2.config import check_input, settings_of
from kg_detectron.io.images import read_image
from kg_detectron.modeling import Preprocessing
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings
from kg_detectron.training.dataset import LabelledImage, at_natural_scale, augmented, image_of_record

logger = logging.getLogger(__name__)

# Cells of which less than this many pixels a side are left after the augmentations are not worth a target.
_MIN_SIDE = 2


# Masks: run lengths -> label images -> transforms -> one mask and one box per cell


def _label_layers(masks: Iterable[np.ndarray], height: int, width: int) -> list[np.ndarray]:
    """Label images, (H,W) int32, as few as cells that overlap need; cell i has the value i + 1 in just one of them."""
    layers: list[np.ndarray] = []
    for label, pixels in enumerate(masks, start=1):
        layer = next((layer for layer in layers if not layer[pixels].any()), None)
        if layer is None:
            layer = np.zeros(height * width, np.int32)
            layers.append(layer)
        layer[pixels] = label
    return [np.ascontiguousarray(layer.reshape(width, height).T) for layer in layers]


def _transform_cells(
    cells: Sequence[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int], new_size: tuple[int, int]
) -> Instances:
    """Annotations in an image of ``size`` (H, W) -> `Instances` of ``new_size``, less cells under 2 x 2 pixels."""
    layers = _label_layers((foreground(decode_runs(cell["segmentation"]["counts"])) for cell in cells), *size)
    found = {}
    for layer in layers:
        warped = transforms.apply_segmentation(layer)
        for index, window in enumerate(ndimage.find_objects(warped)):
            if window is not None and all(side.stop - side.start >= _MIN_SIDE for side in window):
                found[index] = (warped, *window)
    kept = sorted(found)
    boxes = np.zeros((len(kept), 4), np.float32)
    masks = np.zeros((len(kept), *new_size), bool)
    for row, index in enumerate(kept):
        warped, ys, xs = found[index]
        boxes[row] = xs.start, ys.start, xs.stop, ys.stop
        masks[row, ys, xs] = warped[ys, xs] == index + 1
    return Instances(
        new_size,
        gt_boxes=Boxes(torch.from_numpy(boxes)),
        gt_classes=torch.tensor([_class_of(cells[index]) for index in kept], dtype=torch.int64),
        gt_masks=BitMasks(torch.from_numpy(masks)),
    )


def _class_of(cell: dict[str, Any]) -> int:
    """The class of an annotation, from 0; -1 where it is not known."""
    return -1 if cell.get("unclassified") else cell["category_id"]


# Meta-architectures that do all preprocessing of an evaluation themselves.
PREPARING = ("KGInstanceSegmentation", "CellInstanceSegmentation", "CellGeneralizedRCNN")


class CellMapper:
    """Record of a dataset -> what the models take.

    ``image``: (3, H, W) tensor, channels in the order of ``image_format``; prepared by the model's preprocessing and
    the augmentations (float32, 0..255), or raw where the model prepares it itself. ``file_name``, ``image_id``,
    ``height``, ``width``: the record's, so that predictions can go back to the frame of the file. ``instances``, where
    ``with_targets`` is set: `Instances` with ``gt_boxes`` (the masks' tight boxes), ``gt_classes`` and ``gt_masks``
    (`BitMasks`), possibly of no cell. A class that is not known is -1.

    `CellMapper(cfg, is_train=True)` augments and gives targets; `CellMapper(cfg, is_train=False)` gives what evaluation
    takes; `CellMapper(cfg, is_train=False, with_targets=True)` gives prepared images and their targets.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        preprocessing: Preprocessing,
        image_format: str = "BGR",
        with_targets: bool = True,
        raw: bool = False,
        windows: Callable[[LabelledImage], tuple[torch.Tensor, dict[str, torch.Tensor]]] | None = None,
        takes_unclassified: bool = True,
    ):
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT must be BGR or RGB, got {image_format!r}")
        self.augmentations = T.AugmentationList(augmentations)
        self.preprocessing = preprocessing
        self.image_format = image_format
        self.with_targets = with_targets
        self.raw = raw and not with_targets
        self.windows = windows
        self.takes_unclassified = takes_unclassified
        logger.info("Augmentations: %s", self.augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        raw = cfg.MODEL.META_ARCHITECTURE in PREPARING
        if raw:
            check_input(cfg)
        return {
            "augmentations": build_augmentations(cfg, is_train),
            "preprocessing": settings_of(cfg, Preprocessing),
            "image_format": cfg.INPUT.FORMAT,
            "with_targets": is_train,
            "raw": raw,
            "windows": _windows(cfg, is_train),
            "takes_unclassified": raw
            and (cfg.MODEL.META_ARCHITECTURE == "CellInstanceSegmentation" or cfg.MODEL.ROI_HEADS.NAME == "KGROIHeads"),
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map one record, which stays as it is.

        Raises:
            ValueError: an image that cannot be read or normalised, or has another size than the record says; a mask
                that is not in compressed run lengths, which `register_cells` makes of any.
        """
        unclassified = any(cell.get("unclassified") for cell in record.get("annotations", ()))
        if self.with_targets and unclassified and not self.takes_unclassified:
            raise ValueError(
                f"{record['file_name']}: some of its cells have no category, which only the heads of the keypoint "
                "graph can learn from; give each one, or make one category of all (kg-detectron convert)"
            )
        if self.windows is not None and self.with_targets:
            return self._window(record)
        image = read_image(record["file_name"])
        size = record["height"], record["width"]
        if image.shape[:2] != size:
            raise ValueError(f"{record['file_name']}: expected {size} pixels (height, width), got {image.shape[:2]}")
        mapped = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
        if self.raw:
            return mapped | {"image": _tensor(image)}
        try:
            image = self.preprocessing.levels(image)(image)
        except ValueError as error:
            raise ValueError(f"{record['file_name']}: {error}") from None
        if self.image_format == "RGB":
            image = image[:, :, ::-1]
        cells = [cell for cell in record.get("annotations", ()) if not cell.get("iscrowd", 0)]
        if not all(isinstance(cell["segmentation"], dict) for cell in cells):
            raise ValueError(f"{record['file_name']}: a mask is not in run lengths; register the set by register_cells")
        boxes = np.array([cell["bbox"] for cell in cells], np.float64).reshape(-1, 4)
        if cells:
            boxes = BoxMode.convert(boxes, cells[0]["bbox_mode"], BoxMode.XYXY_ABS)
        frame = T.AugInput(image, boxes=boxes)
        transforms = self.augmentations(frame)
        mapped["image"] = _tensor(frame.image)
        if self.with_targets:
            mapped["instances"] = _transform_cells(cells, transforms, size, frame.image.shape[:2])
        return mapped

    def _window(self, record: dict[str, Any]) -> dict[str, Any]:
        """A window whose scale follows the size of the cells; in evaluation the whole image at that scale."""
        assert self.windows is not None
        image, target = self.windows(image_of_record(record, self.preprocessing))
        instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(target["boxes"]))
        instances.gt_classes = target["labels"] - 1
        instances.gt_masks = BitMasks(target["masks"])
        mapped = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
        return mapped | {"image": image if self.image_format == "BGR" else image.flip(0), "instances": instances}


def _windows(
    cfg: CfgNode, is_train: bool
) -> Callable[[LabelledImage], tuple[torch.Tensor, dict[str, torch.Tensor]]] | None:
    """What makes training windows, or for validation whole images, where the scale follows the size of the cells."""
    preprocessing = settings_of(cfg, Preprocessing)
    if preprocessing.resize != "isotropic":
        return None
    if not is_train:
        return functools.partial(at_natural_scale, diameter=preprocessing.predicted_diameter)
    geometry, colours = settings_of(cfg, GeometrySettings), settings_of(cfg, ColourSettings)

    def window(source: LabelledImage) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # NumPy's global generator is that of the sample.
        generator = np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint64))
        return augmented(source, preprocessing.diameter, geometry, colours, generator)

    return window


def _tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) of any type -> (3, H, W)."""
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
