"""Cell datasets for Detectron2: registration, the paper's augmentations and the mapper.

H, W are the sides of an image or of the network input, pixels; N counts cells. Boxes are xyxy in continuous coordinates
(the last pixel + 1). All randomness comes from NumPy's global generator, which `SampleDataset` seeds for every sample.
"""

import functools
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.utils import comm
from scipy import ndimage
from torch.utils.data import DataLoader

from kg_detectron.d2.sampler import EndlessSampler, SampleDataset
from kg_detectron.io.coco import decode_runs, load_coco
from kg_detectron.io.images import read_image
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.resize import resize_image, resize_labels

logger = logging.getLogger(__name__)

# Cells of which less than this many pixels a side are left after the augmentations are not worth a target.
_MIN_SIDE = 2


# Registration


def register_cells(name: str, json_file: str, image_root: str) -> None:
    """Register a dataset of cells in COCO format under ``name``.

    The files are read when the dataset is first asked for, and need not exist before. Then ``thing_classes`` and
    ``thing_dataset_id_to_contiguous_id`` join the metadata, as the file names them.

    Errors, when the dataset is read: those of `load_coco`, which name the file.
    """

    def load() -> list[dict[str, Any]]:
        dataset = load_coco(json_file, image_root)
        MetadataCatalog.get(name).set(
            thing_classes=list(dataset.category_names),
            thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(dataset.category_ids)},
        )
        return [
            {**record, "annotations": [{**cell, "bbox_mode": BoxMode.XYWH_ABS} for cell in record["annotations"]]}
            for record in dataset.records
        ]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="cells")


def register_all_cells(root: str | None = None) -> None:
    """Register neural_{train,val,test}, dsb2018_{train,val,test} and synthetic_{train,val}.

    The layout is ROOT/NAME/SPLIT/*.png with ROOT/NAME/instances_SPLIT.json; ``root`` is by default the environment's
    DETECTRON2_DATASETS, or ``datasets``. Names that are registered already stay.
    """
    root = root or os.environ.get("DETECTRON2_DATASETS", "datasets")
    splits = {"neural": ("train", "val", "test"), "dsb2018": ("train", "val", "test"), "synthetic": ("train", "val")}
    for dataset, parts in splits.items():
        for split in parts:
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                folder = os.path.join(root, dataset)
                register_cells(name, os.path.join(folder, f"instances_{split}.json"), os.path.join(folder, split))


def register_files(names: Iterable[str]) -> None:
    """Register every one of `names` that is the path of a COCO JSON file (it ends in ``.json``), under that path.

    Its images are named from the file's folder, as `kg-detectron convert` names them. Names that are registered already
    stay.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for name in names:
        if name.endswith(".json") and name not in DatasetCatalog:
            if not os.path.isfile(name):
                raise FileNotFoundError(f"dataset {name}: there is no such file")
            register_cells(name, name, os.path.dirname(name))


# Augmentations


class ExpandTransform(T.PadTransform):
    """Pad an image with one value per channel, and label images with 0."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        height, width = img.shape[:2]
        canvas = np.empty((self.y0 + height + self.y1, self.x0 + width + self.x1, *img.shape[2:]), img.dtype)
        canvas[:] = self.pad_value
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class RandomExpand(T.Augmentation):
    """Put the image at a random place on a canvas up to ``ratio`` times as wide and as high.

    ``fill`` is the grey level of the canvas; None takes each channel's median along the image's border, which is
    background in fluorescence, bright-field and stained images alike. (A fixed value would frame most of them with an
    edge that no real image has.)
    """

    def __init__(self, ratio: float, fill: float | None = None):
        if ratio < 1:
            raise ValueError(f"ratio of the random expansion must be at least 1, got {ratio}")
        self.ratio = ratio
        self.fill = fill

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        ratio = self._rand_range(1, self.ratio)
        spare_y, spare_x = round(height * ratio) - height, round(width * ratio) - width
        top, left = np.random.randint(spare_y + 1), np.random.randint(spare_x + 1)
        fill = self.fill
        if fill is None:
            fill = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
        return ExpandTransform(left, top, spare_x - left, spare_y - top, orig_w=width, orig_h=height, pad_value=fill)


class RandomCellCrop(T.Augmentation):
    """Crop a random window that contains the centre of at least one cell, where the image has any.

    Each side of the window is between ``smallest`` and 1 of the image's, and its aspect, relative to the image's,
    between 1/2 and 2: every image is resized to one size afterwards, so this is the distortion that the crop adds.
    """

    def __init__(self, smallest: float):
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest side of the random crop must be in (0, 1], got {smallest}")
        self.smallest = smallest

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        part_y = self._rand_range(self.smallest, 1)
        part_x = self._rand_range(max(self.smallest, part_y / 2), min(1, part_y * 2))
        window_h, window_w = max(1, round(height * part_y)), max(1, round(width * part_x))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N,2) x, y
        centres = centres[((centres >= 0) & (centres < (width, height))).all(axis=1)]
        centre_x, centre_y = centres[np.random.randint(len(centres))] if len(centres) else (None, None)
        left = _random_start(width, window_w, centre_x)
        top = _random_start(height, window_h, centre_y)
        return T.CropTransform(left, top, window_w, window_h, orig_w=width, orig_h=height)


def _random_start(length: int, window: int, inside: float | None) -> int:
    """First pixel of a random window on an axis; the window contains the coordinate ``inside``, unless that is None."""
    first, last = 0, length - window
    if inside is not None:
        first, last = max(first, int(inside) - window + 1), min(last, int(inside))
    return int(np.random.randint(first, last + 1))


class ExactResizeTransform(T.Transform):
    """Resize h x w to new_h x new_w: a coordinate x becomes x * new_w / w in images, labels and boxes alike.

    By `resize_image` and `resize_labels`, as in prediction. Detectron2's own transform shifts labels of other types
    than uint8 by up to half a pixel.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return resize_image(img, (self.new_h, self.new_w))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return resize_labels(segmentation, (self.new_h, self.new_w))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * (self.new_w / self.w, self.new_h / self.h)

    def inverse(self) -> T.Transform:
        return ExactResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ExactResize(T.Augmentation):
    """Resize to ``size`` (height, width), not keeping the aspect, as the paper does."""

    def __init__(self, size: tuple[int, int]):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive height and width, got {size}")
        self.size = tuple(size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return ExactResizeTransform(*image.shape[:2], *self.size)


class RandomWindow(T.Augmentation):
    """Cut a window of ``size`` (height, width) at a random place, of the whole image where it is smaller.

    Cells at the window's edge are cut; what is left of them are cells too, as at the edge of an image.
    """

    def __init__(self, size: tuple[int, int]):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive height and width, got {size}")
        self.size = tuple(size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        (h, w), (height, width) = image.shape[:2], np.minimum(self.size, image.shape[:2]).tolist()
        return T.CropTransform(np.random.randint(w - width + 1), np.random.randint(h - height + 1), width, height, w, h)


def scale_intensity(image: np.ndarray, gain: float, shift: float) -> np.ndarray:
    """``gain * image + shift``, clipped to 0..255, of an image of floats. The type stays."""
    return np.clip(image * gain + shift, 0, 255).astype(image.dtype)


class RandomContrast(T.Augmentation):
    """Multiply the image by a random factor (about black, as the published code does, not about the mean)."""

    def __init__(self, lowest: float, highest: float):
        if not 0 < lowest <= highest:
            raise ValueError(f"contrast factors must be positive and in rising order, got {lowest}, {highest}")
        self.lowest = lowest
        self.highest = highest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gain = self._rand_range(self.lowest, self.highest)
        return T.ColorTransform(functools.partial(scale_intensity, gain=gain, shift=0.0))


class RandomBrightness(T.Augmentation):
    """Add a random value between -``shift`` and ``shift`` grey levels to the image."""

    def __init__(self, shift: float):
        if shift < 0:
            raise ValueError(f"brightness shift must not be negative, got {shift}")
        self.shift = shift

    def get_transform(self, image: np.ndarray) -> T.Transform:
        shift = self._rand_range(-self.shift, self.shift)
        return T.ColorTransform(functools.partial(scale_intensity, gain=1.0, shift=shift))


class RandomChannelOrder(T.Augmentation):
    """Permute the colour channels at random (the order may come out unchanged)."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        order = np.random.permutation(image.shape[2])
        return T.ColorTransform(functools.partial(np.take, indices=order, axis=2))


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations that ``cfg.INPUT`` asks for (paper, section 3), each with probability 1/2, and the resize.

    In testing the resize alone. Flips and colours come after it, where there are fewer pixels to touch.

    Errors: a ValueError names a value out of its range.
    """
    aug = cfg.INPUT.AUGMENTATION
    resize = ExactResize(cfg.INPUT.SIZE)
    if not is_train:
        return [resize]
    steps: list[T.Augmentation] = []
    if aug.EXPAND != 1:
        steps.append(T.RandomApply(RandomExpand(aug.EXPAND)))
    if aug.CROP != 1:
        steps.append(T.RandomApply(RandomCellCrop(aug.CROP)))
    steps.append(resize)
    if tuple(aug.WINDOW) != (0, 0):
        steps.append(RandomWindow(aug.WINDOW))
    if aug.FLIP:
        steps += [T.RandomFlip(horizontal=True), T.RandomFlip(horizontal=False, vertical=True)]
    if tuple(aug.CONTRAST) != (1, 1):
        steps.append(T.RandomApply(RandomContrast(*aug.CONTRAST)))
    if aug.BRIGHTNESS != 0:
        steps.append(T.RandomApply(RandomBrightness(aug.BRIGHTNESS)))
    if aug.PERMUTE_CHANNELS:
        steps.append(T.RandomApply(RandomChannelOrder()))
    return steps


# Masks: run lengths -> label images -> transforms -> one mask and one box per cell


def _rle_pixels(counts: str | bytes) -> np.ndarray:
    """(P,) int64: flat indices, columns first, of the pixels of one mask in COCO's compressed run lengths.

    pycocotools decodes to a dense image per cell; with hundreds of cells that costs more than the augmentation.
    """
    runs = decode_runs(counts)
    start, length = np.cumsum(runs)[: len(runs) - 1 : 2], runs[1::2]  # of the runs of foreground
    return np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())


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
    layers = _label_layers((_rle_pixels(cell["segmentation"]["counts"]) for cell in cells), *size)
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
        gt_classes=torch.tensor([cells[index]["category_id"] for index in kept], dtype=torch.int64),
        gt_masks=BitMasks(torch.from_numpy(masks)),
    )


class CellMapper:
    """Record of a dataset -> what the models take.

    ``image``: (3,H,W) tensor, float32, 0..255 by the normalisation, channels in the order of ``image_format``, after
    the augmentations. ``file_name``, ``image_id``, ``height``, ``width``: the record's, so
    that predictions can go back to the frame of the file. ``instances``, where ``with_targets`` is set: `Instances`
    with ``gt_boxes`` (the masks' tight boxes), ``gt_classes`` and ``gt_masks`` (`BitMasks`), possibly of no cell.

    `CellMapper(cfg, is_train=True)` augments and gives targets; `CellMapper(cfg, is_train=False)` only resizes;
    `CellMapper(cfg, is_train=False, with_targets=True)` gives the targets of the image as it is.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        normalisation: Normalisation,
        image_format: str = "BGR",
        with_targets: bool = True,
    ):
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT must be BGR or RGB, got {image_format!r}")
        self.augmentations = T.AugmentationList(augmentations)
        self.normalisation = normalisation
        self.image_format = image_format
        self.with_targets = with_targets
        logger.info("Augmentations: %s", self.augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "augmentations": build_augmentations(cfg, is_train),
            "normalisation": Normalisation(cfg.INPUT.NORMALISATION, tuple(cfg.INPUT.PERCENTILES)),
            "image_format": cfg.INPUT.FORMAT,
            "with_targets": is_train,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map one record, which stays as it is.

        Errors: those of `read_image` and `Normalisation`; a ValueError where the image has another size than the record
        says, or a cell's mask is not in compressed run lengths, which `register_cells` makes of any.
        """
        image = read_image(record["file_name"])
        size = record["height"], record["width"]
        if image.shape[:2] != size:
            raise ValueError(f"{record['file_name']}: expected {size} pixels (height, width), found {image.shape[:2]}")
        try:
            image = self.normalisation(image)
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
        mapped = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(frame.image.transpose(2, 0, 1)))
        if self.with_targets:
            mapped["instances"] = _transform_cells(cells, transforms, size, frame.image.shape[:2])
        return mapped


# Loaders


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Endless batches of augmented images of ``cfg.DATASETS.TRAIN``, the same under one ``cfg.SEED`` (0 or more).

    Which image comes when, and how it is augmented, depends on the seed and the number of samples before it alone, not
    on ``cfg.DATALOADER.NUM_WORKERS``. ``.sampler`` is an `EndlessSampler`; set its ``start`` before the first batch to
    go on with a run.

    Errors: a ValueError where the batch does not divide among the processes, and for what would make the samples depend
    on more than their place: other samplers than TrainingSampler, grouping by aspect ratio (needless here, for all
    images get one size).
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, got {cfg.DATALOADER.SAMPLER_TRAIN!r}")
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError("DATALOADER.ASPECT_RATIO_GROUPING must be False: all images are resized to INPUT.SIZE")
    rank, processes, batch = comm.get_rank(), comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch < 1 or batch % processes:
        raise ValueError(f"SOLVER.IMS_PER_BATCH must be a positive multiple of the {processes} processes, got {batch}")
    names = list(cfg.DATASETS.TRAIN)
    records = get_detection_dataset_dicts(names, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    return _SteadyLoader(
        # A list that worker processes share, instead of a copy for each.
        SampleDataset(DatasetFromList(records, copy=False), CellMapper(cfg, is_train=True)),
        sampler=EndlessSampler(len(records), cfg.SEED, rank=rank, world_size=processes),
        batch_size=batch // processes,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        worker_init_fn=_leave_signals_to_main_process,
        # The loader draws a number for its workers, which nobody uses; without this, from the training's generator.
        generator=torch.Generator(),
    )


class _SteadyLoader(DataLoader):
    """A loader whose workers are born with SIGTERM blocked, in all their threads, those of libraries too."""

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main_process(worker: int) -> None:
    """Ctrl-C and schedulers signal all processes; the main one then ends its iteration, and needs its workers for that.

    A SIGTERM of the main process itself, which ends its workers so at its exit, still ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def build_validation_loader(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Every image of ``cfg.DATASETS.VALIDATION`` once, with targets and without augmentation, one image a batch.

    One image a batch makes the mean loss over the images independent of the batch size and the number of processes.

    Errors: a ValueError where ``cfg.DATASETS.VALIDATION`` is empty.
    """
    if not cfg.DATASETS.VALIDATION:
        raise ValueError("DATASETS.VALIDATION is empty: the validation loss needs a dataset")
    mapper = CellMapper(cfg, is_train=False, with_targets=True)
    return _build_finite_loader(cfg, list(cfg.DATASETS.VALIDATION), mapper)


def build_test_loader(cfg: CfgNode, name: str) -> Iterable[list[dict[str, Any]]]:
    """Every image of the dataset `name` once, without targets and augmentation, one image a batch."""
    return _build_finite_loader(cfg, name, CellMapper(cfg, is_train=False))


def _build_finite_loader(cfg: CfgNode, names: str | list[str], mapper: CellMapper) -> DataLoader:
    loader = build_detection_test_loader(cfg, names, mapper=mapper)
    return _SteadyLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=_leave_signals_to_main_process,
    )
