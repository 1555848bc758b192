"""What every method is: images in, cells out, or losses. The stages that all methods share.

H, W: an image's height and width in pixels; h, w: those of the network's input.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.io.scale_bars import without_scale_bars
from kg_detectron.modeling.cell_size import choose_view
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.precision import autocast, check_precision
from kg_detectron.modeling.preprocessing import NetworkImage, Preprocessing, as_tensor
from kg_detectron.modeling.scores import Scores
from kg_detectron.modeling.settings import to_plain


class InstanceNet(nn.Module, ABC):
    """Base of the methods, with the calling convention of torchvision's detection models.

    In training ``model(images, targets)`` returns a dict of losses, of images that a training loader has prepared; in
    evaluation ``model(images)`` takes raw images, does all preprocessing itself, and returns the `Cells` of each.

    A method has a frozen dataclass of settings (`Settings`), whose field ``preprocessing`` is a `Preprocessing`, is
    made from it by `build`, and defines `losses` and `find`. `register_method` gives it a name.

    Attributes:
        settings: of this model.
        scores: how scores become probabilities, and the threshold that belongs to them; part of the model file.
    """

    method: ClassVar[str] = ""
    Settings: ClassVar[type] = type(None)
    # Whether `kg_detectron.inference.tiling` knows how to run it tile by tile.
    tiled: ClassVar[bool] = False
    # Sides of the network's input are multiples of it.
    divisor: int = 16
    place: Tensor

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.scores = Scores()
        self.precision = "float32"
        self.layout = torch.contiguous_format
        self.is_compiled = False
        self.register_buffer("place", torch.zeros(()), persistent=False)  # its device and type are the model's

    @classmethod
    @abstractmethod
    def build(cls, settings: Any) -> "InstanceNet":
        """The network of settings, with the initial weights that they name."""

    @abstractmethod
    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        """Weighted losses, by name.

        A method whose settings have a part ``classes`` takes ``labels`` as well, N tensors (M,) of int64, the class of
        each cell, 1..K, or 0 where it is not known; it gets them where it has several classes.

        Args:
            batch: (N, 3, h, w), the network's input.
            boxes: N tensors (M, 4), xyxy continuous, input pixels.
            masks: N tensors (M, H, W), bool.
        """

    @abstractmethod
    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        """The cells of each image, by falling score, which need not be a probability.

        Args:
            batch: (N, 3, h, w), the network's input.
            sizes: (H, W) of each of the N images, without the padding.
        """

    def find_above(
        self, batch: Tensor, sizes: Sequence[tuple[int, int]], min_score: float, scores: Scores
    ) -> list[Cells]:
        """As `find`; a method may leave out cells whose probability by ``scores`` cannot reach ``min_score`` before it
        segments them."""
        return self.find(batch, sizes)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that this model was trained with."""
        return self.settings.preprocessing

    @property
    def classes(self) -> ClassSettings:
        """The classes that `Cells.labels` are of; methods that tell no classes apart have one."""
        return getattr(self.settings, "classes", ClassSettings())

    def of_classes(self, name: str) -> bool:
        """Whether a weight, by its name, is of the classes: with other classes a training begins it anew."""
        return ".class_head." in name

    def of_confidence(self, name: str) -> bool:
        """Whether a weight, by its name, is of a confidence head."""
        return ".confidence_head." in name

    def with_preprocessing(self, **changes: Any) -> "InstanceNet":
        """Change settings of the preprocessing, in place, and return the model."""
        changed = dataclasses.replace(self.preprocessing, **changes)
        self.settings = dataclasses.replace(self.settings, preprocessing=changed)
        return self

    def description(self) -> dict[str, Any]:
        """What a model file needs to build the network again, as nested dicts without initial weights."""
        plain = to_plain(self.settings)
        plain.get("backbone", {}).pop("backbone_weights", None)
        return {"method": self.method, "settings": plain, "scores": to_plain(self.scores)}

    def dense_modules(self) -> list[nn.Module]:
        """The modules that work on whole maps, once an image; what is left works cell by cell."""
        return list(self.children())

    def accelerate(
        self, precision: str = "float32", channels_last: bool = False, compiled: bool = False
    ) -> "InstanceNet":
        """Set how the model runs in evaluation, in place, and return the model. Decoding runs in float32 in any case.

        Args:
            precision: of the convolutions: "float32", "bfloat16" or "float16"; the last is for GPUs, and takes CPUs
                without such instructions up to a hundred times as long.
            channels_last: keep the maps with the channels last: faster on CPUs, and on GPUs in half precision.
            compiled: let `torch.compile` compile the dense modules, for good: a minute at the first image, and a C++
                compiler at hand.

        Raises:
            ValueError: another precision.
        """
        self.precision = check_precision(precision)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.layout)  # type: ignore[call-overload]  # PyTorch's overloads lack it
        self.is_compiled = self.is_compiled or compiled
        if compiled:
            for module in self.dense_modules():
                module.compile()
        return self

    def forward(
        self, images: Sequence[Tensor | np.ndarray], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Cells]:
        """Losses in training, cells in evaluation.

        Args:
            images: in training N tensors (3, H, W), BGR, 0..255, sizes may differ. In evaluation raw images, (3, H, W)
                tensors or (H, W, 3) arrays, BGR, or (H, W) arrays, grey, of any type that the normalisation takes.
            targets: in training, for each image a dict with ``boxes`` (M, 4), xyxy continuous input pixels,
                ``masks`` (M, H, W), bool, and where there are several classes ``labels`` (M,) int64, the class of each,
                1..K, or 0 where it is not known.

        Returns:
            In training the losses by name. In evaluation the cells of each image, in its own frame.

        Raises:
            ValueError: images or targets that do not have these shapes.
        """
        if not self.training:
            return [self.predict_whole(_as_array(image)) for image in images]
        prepared = _checked_images(images)
        boxes, masks = _checked_targets(prepared, targets)
        labels: dict[str, Any] = {}
        if len(self.classes) > 1:
            labels["labels"] = _checked_labels(targets or (), len(self.classes))
        return self.losses(self.preprocessing.batch(prepared, self.divisor), boxes, masks, **labels)

    def predict_whole(self, image: np.ndarray) -> Cells:
        """The cells of a raw image, in its frame: all steps, the image at once."""
        seen, source = self.network_image(image)
        cells = self.detect_seen(seen)
        cells = cells.in_frame(image.shape[:2], seen.scale, seen.border)
        return dataclasses.replace(cells, scale_source=source, view=seen.view)

    def network_image(
        self,
        image: np.ndarray,
        *,
        scale: float | None = None,
        diameter: float | None = None,
        pixel_size: float | None = None,
        preprocessing: Preprocessing | None = None,
        view: str | None = None,
    ) -> tuple[NetworkImage, str]:
        """A raw image as the network sees it, without scale bars, and where its scale comes from.

        Args:
            image: (H, W, 3), or (H, W), grey.
            scale, diameter, pixel_size: see `kg_detectron.inference.predictor.predict`.
            preprocessing: instead of the model's own.
            view: of `Preprocessing.views`; None lets the model choose.

        Raises:
            ValueError: an image of another shape, type or range, or more than one way to the scale.
        """
        if not hasattr(image, "shape"):
            raise ValueError(
                f"image: expected an array (H, W, 3) or (H, W), got {type(image).__name__}; read_image reads a file"
            )
        if len(image.shape) == 2:
            image = np.broadcast_to(image[..., None], (*image.shape, 3))
        if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"image: expected shape (H, W, 3), BGR, or (H, W), grey, got {tuple(image.shape)}; "
                "read_image chooses channels and planes of a file"
            )
        settings = preprocessing or self.preprocessing
        shown = without_scale_bars(image)
        views = settings.views(shown, view)
        given = settings.known_scale(image.shape[:2], scale, diameter, pixel_size)
        view, found = choose_view(self, shown, views, given)
        seen = NetworkImage(shown, views[view], found.value, settings.border, painted=shown is not image)
        return seen, found.source

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[Cells]:
        """The cells of images (3, h, w) of 0..255 that are prepared, in their frame; scores are probabilities."""
        return self.detect_in(self.batch(images), [(image.shape[1], image.shape[2]) for image in images])

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """The network's input (N, 3, h, w) of images (3, h, w) of 0..255, in the layout of the model's maps."""
        batch = self.preprocessing.batch(_checked_images(images), self.divisor)
        return batch.contiguous(memory_format=self.layout)

    @torch.no_grad()
    def detect_in(
        self,
        batch: Tensor,
        sizes: Sequence[tuple[int, int]],
        min_score: float = 0.0,
        scores: Scores | None = None,
    ) -> list[Cells]:
        """As `detect`, of images that `batch` has put together: whoever calls need not keep them in memory.

        Cells of a probability below ``min_score`` are left out, which saves their masks. ``scores`` stands in for the
        model's own.
        """
        with autocast(self.precision, batch.device):
            found = self.find_above(batch, sizes, min_score, scores or self.scores)
        return [self.rated(cells, min_score, scores) for cells in found]

    def rated(self, cells: Cells, min_score: float = 0.0, scores: Scores | None = None) -> Cells:
        """Cells with raw scores, in the frame of the network's input -> with probabilities, by falling probability."""
        probability = (scores or self.scores)(cells.scores, cells.boxes)
        order = probability.argsort(descending=True, stable=True)
        return dataclasses.replace(cells, scores=probability)[order].above(min_score)

    def detect_seen(
        self,
        seen: NetworkImage,
        window: tuple[slice, slice] = (slice(None), slice(None)),
        min_score: float = 0.0,
        scores: Scores | None = None,
    ) -> Cells:
        """The cells in a window of an image, rows and columns, in its frame; for the others see `detect_in`."""
        batch, size = self.batch_of(seen, window)
        (cells,) = self.detect_in(batch, [size], min_score, scores)
        return cells

    def batch_of(
        self, seen: NetworkImage, window: tuple[slice, slice] = (slice(None), slice(None))
    ) -> tuple[Tensor, tuple[int, int]]:
        """The network's input (1, 3, h, w) of a window of an image, and the window's size without the padding."""
        image = as_tensor(seen[window], self.place)
        return self.batch([image]), (image.shape[1], image.shape[2])

    @property
    def threshold(self) -> float:
        """The score from which on cells are taken for true, unless somebody asks for others."""
        return self.scores.threshold


def cells_of_image(boxes: Tensor, scores: Tensor, masks: MaskCrops, labels: Tensor | None = None) -> Cells:
    """Cells of the classes ``labels`` (R,), 1..K; of one class by default."""
    return Cells(boxes, scores, torch.ones_like(scores, dtype=torch.long) if labels is None else labels, masks)


def _as_array(image: Tensor | np.ndarray) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image


def _checked_images(images: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
    if not len(images):
        raise ValueError("images: expected at least one image, got an empty list")
    checked = []
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"images[{i}]: expected a tensor (3, H, W), got {type(image).__name__} {tuple(image.shape)}"
            )
        checked.append(image if image.is_floating_point() else image.float())
    return checked


def _checked_targets(
    images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None
) -> tuple[list[Tensor], list[Tensor]]:
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else len(targets)
        raise ValueError(f"targets: training needs one dict for each of {len(images)} images, got {got}")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        boxes, masks = target["boxes"], target["masks"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"targets[{i}]['boxes']: expected shape (M, 4), got {tuple(boxes.shape)}")
        if tuple(masks.shape) != (len(boxes), *image.shape[1:]):
            expected = (len(boxes), *image.shape[1:])
            raise ValueError(f"targets[{i}]['masks']: expected shape {expected}, got {tuple(masks.shape)}")
    return [target["boxes"] for target in targets], [target["masks"] for target in targets]


def _checked_labels(targets: Sequence[dict[str, Tensor]], classes: int) -> list[Tensor]:
    for i, target in enumerate(targets):
        labels = target.get("labels")
        if labels is None or labels.shape != (len(target["boxes"]),) or labels.is_floating_point():
            got = None if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"targets[{i}]['labels']: expected integers ({len(target['boxes'])},), got {got}")
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= classes):
            raise ValueError(f"targets[{i}]['labels']: expected classes of 0..{classes}, got {labels.tolist()[:8]}")
    return [target["labels"].long() for target in targets]
