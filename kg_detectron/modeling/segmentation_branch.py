"""Segmentation branch: cut every cell out of the feature maps and segment it there (paper, figure 1b, section 2.2).

Letters: N images, L maps, R boxes, M cells, C channels, P pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from kg_detectron.cells import MaskCrops, clip_boxes
from kg_detectron.layers import crop_pixels
from kg_detectron.modeling.backbone import zero_bias
from kg_detectron.modeling.classes import ClassHead, ClassSettings, masked_mean
from kg_detectron.modeling.confidence import ConfidenceHead, best_ious, head_inputs
from kg_detectron.modeling.packed_crops import crop_windows, packed_logits, window_sizes
from kg_detectron.modeling.precision import for_losses
from kg_detectron.modeling.processes import generators_of_images, loss_divisor
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import UpCombine, convolution

CUT_FROM = ("features", "s1")
CONFIDENCE = ("", "mask", "context")


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of the segmentation branch (the paper's by default).

    Attributes:
        cut_from: "features": crops of the backbone's c0..c4; "s1": crops of the decoder map s1, the paper's `seg s1`.
        mask_weight: weight of the mask loss.
        box_jitter: in training every edge of a true box is moved at random by up to this fraction of the box's side, as
            detected boxes are off; at least 0 and below 0.5. Ours.
        mask_margin: input pixels by which crops extend beyond their boxes, on every side; the box of the cell is then
            that of its mask. It needs training with `box_jitter`, for otherwise masks fill their crops. Ours.
        mask_threshold: probability from which a pixel belongs to the cell.
        cells_per_image: in training at most so many cells of an image, drawn at random, have their masks computed; 0
            takes all. It bounds the time of an iteration. Ours.
        confidence: what a confidence head sees of each mask, see `ConfidenceHead`: "mask", the features that the mask
            is predicted from, which look alike in images of all kinds; "context", besides these the branch's other
            features and the maps, but for the deepest: better in images like those of the training, and worse in
            others; "", there is no head. Ours.
        chunk_pixels: pixels of crops that go through the branch together, which bounds its memory; a chunk may exceed
            this by one crop.

    Raises:
        ValueError: a value out of its range, or a margin without jitter.
    """

    NODE: ClassVar[str] = "MODEL.CELLS"

    cut_from: str = "features"
    mask_weight: float = 1.0
    box_jitter: float = 0.0
    mask_margin: float = 0.0
    mask_threshold: float = 0.5
    cells_per_image: int = 0
    confidence: str = ""
    chunk_pixels: int = 2**18

    def __post_init__(self) -> None:
        require(self.cut_from in CUT_FROM, "cut_from", f"one of {', '.join(CUT_FROM)}", self.cut_from)
        require(self.mask_weight >= 0, "mask_weight", "0 or more", self.mask_weight)
        require(0 <= self.box_jitter < 0.5, "box_jitter", "a fraction from 0 to below 0.5", self.box_jitter)
        require(self.mask_margin >= 0, "mask_margin", "0 or more pixels", self.mask_margin)
        require(0 < self.mask_threshold < 1, "mask_threshold", "a probability between 0 and 1", self.mask_threshold)
        expected = "one of " + ", ".join(map(repr, CONFIDENCE))
        require(self.confidence in CONFIDENCE, "confidence", expected, self.confidence)
        require(self.cells_per_image >= 0, "cells_per_image", "0 or more", self.cells_per_image)
        require(self.chunk_pixels >= 1, "chunk_pixels", "a positive number", self.chunk_pixels)
        if self.mask_margin and not self.box_jitter:
            raise ValueError(
                f"mask_margin: {self.mask_margin} pixels need training with box_jitter, which is 0: masks that were "
                "trained on exact boxes fill their crops"
            )


class Crops(NamedTuple):
    """What the segmentation branch makes of R boxes.

    Attributes:
        logits: R mask logits (h, w), of the box's own size.
        windows: (R, 4) int64 xyxy on the CPU, their places.
        class_logits: (R, K), or None where there is one class.
        confidence_logits: (R,), or None without a confidence head.
    """

    logits: list[Tensor]
    windows: Tensor
    class_logits: Tensor | None
    confidence_logits: Tensor | None


class Segmented(NamedTuple):
    """The cells of one image.

    Attributes:
        masks: R masks.
        labels: (R,) int64, the class of each, 1..K.
        confidence: (R,) 0..1, of each; 1 without a confidence head.
    """

    masks: MaskCrops
    labels: Tensor
    confidence: Tensor


class SegmentationBranch(nn.Module):
    """Masks and classes of boxes, from feature maps at strides 1, 2, 4, ...

    `segment_crop` is the branch as the paper describes it, one crop at a time: the specification. `forward` gives the
    same for many crops at once, see `packed_crops`.

    Args:
        in_channels: channels of the L maps: c0..c4, or s1 alone.
        widths: channels of the results at the first L - 1 maps (one number where L is 1).
        settings: see `SegmentationSettings`.
        classes: what classes there are; one by default, which needs no head.

    Raises:
        ValueError: widths that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        settings: SegmentationSettings | None = None,
        classes: ClassSettings | None = None,
    ) -> None:
        super().__init__()
        expected = max(1, len(in_channels) - 1)
        require(len(widths) == expected, "widths", f"{expected} for {len(in_channels)} maps", tuple(widths))
        self.settings = settings or SegmentationSettings()
        deep = (*widths[1:], in_channels[-1])
        self.steps = nn.ModuleList(UpCombine(d, c, w) for d, c, w in zip(deep, in_channels[:-1], widths, strict=False))
        # A crop whose deep levels are left out begins at a shallower map, which must then have that level's width.
        self.project = nn.ModuleList(
            nn.Identity() if c == w else nn.Sequential(convolution(c, w, 1), nn.ReLU(inplace=True))
            for c, w in zip(in_channels, widths, strict=False)
        )
        self.hidden = nn.Sequential(convolution(widths[0], widths[0], 3), nn.ReLU(inplace=True))
        self.predict = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.normal_(self.predict.weight, std=0.01)
        zero_bias(self.predict)
        # The features of a cell are those before the last two convolutions, those between them, which know the outline
        # best, and the deeper maps, which know what is around.
        several = classes is not None and len(classes) > 1
        channels = 2 * widths[0] + sum(in_channels[1:])
        self.class_head = ClassHead(channels, classes) if classes and several else None
        # Which of these channels the confidence head sees. Without a class head the others need not be computed.
        own, deepest = widths[0], in_channels[-1] if len(in_channels) > 1 else 0
        sees = {"": slice(0, 0), "mask": slice(own, 2 * own), "context": slice(0, channels - deepest)}
        self.confidence_sees = sees[self.settings.confidence]
        seen = self.confidence_sees.stop - self.confidence_sees.start
        self.confidence_head = ConfidenceHead(seen) if seen else None
        self.only_hidden = self.class_head is None and self.settings.confidence == "mask"
        if self.only_hidden:
            channels, self.confidence_sees = own, slice(0, own)
        self.cell_channels = channels if self.class_head or self.confidence_head else 0

    @property
    def chunk_pixels(self) -> int:
        """Pixels of crops that go through the branch together."""
        return self.settings.chunk_pixels

    def maps(self, features: Sequence[Tensor], decoded: Mapping[int, Tensor]) -> list[Tensor]:
        """The maps that crops are cut from: c0..c4, or the decoder map s1."""
        return list(features) if self.settings.cut_from == "features" else [decoded[1]]

    def segment_crop(self, maps: Sequence[Tensor], box: Tensor) -> Tensor:
        """Segment one box of one image, as the paper says it.

        Args:
            maps: L maps (C, h, w) at strides 1, 2, 4, ...
            box: (4,) xyxy, continuous, input pixels.

        Returns:
            Mask logits (h, w) of the box's own size: no RoIAlign, no fixed grid.
        """
        return self.predict(self.hidden(self._crop_features(maps, box)))[0, 0]

    def classify_crop(self, maps: Sequence[Tensor], box: Tensor) -> Tensor:
        """The class logits (K,) of one box of one image, with a class head; arguments as of `segment_crop`."""
        assert self.class_head is not None, "one class needs no head"
        return self.class_head(self.crop_mean(maps, box)[None])[0]

    def crop_mean(self, maps: Sequence[Tensor], box: Tensor) -> Tensor:
        """The features (C,) of the cell in one box of one image, which heads see; arguments as of `segment_crop`."""
        features = self._crop_features(maps, box)
        hidden = self.hidden(features)
        probability = self.predict(hidden)[0, 0].detach().sigmoid().flatten()
        crop = torch.zeros(len(probability), dtype=torch.long, device=probability.device)
        ((x1, y1, x2, y2),) = crop_windows(box[None].float().cpu(), [maps[0].shape[1:]])[0].tolist()
        y, x = (torch.arange(low, high, device=features.device) for low, high in ((y1, y2), (x1, x2)))
        # Of a deeper map each pixel of the crop has the pixel that it lies in.
        deeper = [m[:, (y // 2**level)[:, None], x // 2**level] for level, m in enumerate(maps[1:], start=1)]
        pixels = torch.cat((features[0], hidden[0], *deeper)).flatten(1).T
        return masked_mean(pixels, probability, crop, 1)[0]

    def _crop_features(self, maps: Sequence[Tensor], box: Tensor) -> Tensor:
        """(1, C, h, w) of the box's own size, what the last two convolutions take; arguments as of `segment_crop`."""
        windows = crop_windows(box[None].float().cpu(), [m.shape[1:] for m in maps])[:, 0]
        crops = [m[None, :, y1:y2, x1:x2] for m, (x1, y1, x2, y2) in zip(maps, windows.tolist(), strict=True)]
        # A level of less than 2 pixels on a side is left out, and with it all deeper ones.
        small = next((i for i, crop in enumerate(crops) if min(crop.shape[2:]) < 2), len(crops))
        crops = crops[: max(1, small)]
        result = crops[-1]
        if len(crops) <= len(self.project):
            result = self.project[len(crops) - 1](result)
        for step, shallow in zip(reversed(self.steps[: len(crops) - 1]), reversed(crops[:-1]), strict=True):
            result = step(interpolate(result, shallow.shape[2:], mode="bilinear", align_corners=False), shallow)
        return result

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The mask logits of boxes, and their places: those of `crops`."""
        crops = self.crops(maps, boxes)
        return crops.logits, crops.windows

    def crops(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Crops:
        """Segment boxes, and tell their classes and the confidence.

        Args:
            maps: L maps (N, C, h, w) at strides 1, 2, 4, ...
            boxes: N tensors (R, 4), xyxy continuous, input pixels.

        Returns:
            The crops of all boxes, image after image.
        """
        logits, windows, features = packed_logits(self, maps, boxes)
        sizes = window_sizes(windows)
        crops = logits.split(sizes.prod(1).tolist()) if len(sizes) else []
        return Crops(
            [crop.view(tuple(size)) for crop, size in zip(crops, sizes.tolist(), strict=True)],
            windows,
            None if self.class_head is None else self.class_head(features),
            None if self.confidence_head is None else self.confidence_head(features[:, self.confidence_sees], sizes),
        )

    def predict_cells(
        self, maps: Sequence[Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Segmented]:
        """Mask probabilities of the boxes of each image, and of the margin around each, as crops; classes, confidence.

        Args:
            maps, boxes: as in `crops`.
            sizes: (h, w) of each image, input pixels, without the padding; boxes lie within it.
        """
        logits, windows, class_logits, confidence_logits = self.crops(maps, self._with_margin(boxes, sizes))
        counts = [len(b) for b in boxes]
        device = boxes[0].device
        labels = torch.ones(sum(counts), dtype=torch.long, device=device)
        if class_logits is not None:
            labels = 1 + class_logits.argmax(1).to(device)
        confidence = torch.ones(sum(counts), device=device)
        if confidence_logits is not None:
            confidence = confidence_logits.sigmoid().to(device)
        cells = []
        for count, size, *of_image in zip(counts, sizes, labels.split(counts), confidence.split(counts), strict=True):
            crops = [crop.float().sigmoid() for crop in logits[:count]]
            masks = MaskCrops(crops, windows[:count], size, self.settings.mask_threshold)
            cells.append(Segmented(masks, *of_image))
            logits, windows = logits[count:], windows[count:]
        return cells

    def _with_margin(self, boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What is cut out for boxes that are found: with the margin around them that stays in the image."""
        margin = self.settings.mask_margin
        if not margin:
            return boxes
        outwards = boxes[0].new_tensor([-margin, -margin, margin, margin])
        return [clip_boxes(b + outwards, size) for b, size in zip(boxes, sizes, strict=True)]

    def predict_masks(
        self, maps: Sequence[Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[MaskCrops]:
        """The masks of `predict_cells`."""
        return [cells.masks for cells in self.predict_cells(maps, boxes, sizes)]

    def cell_boxes(self, boxes: Tensor, masks: MaskCrops) -> Tensor:
        """The boxes (R, 4) of cells with masks of `predict_masks`: with a margin those of the masks, else as given."""
        return masks.extents().to(boxes) if self.settings.mask_margin else boxes

    def losses(
        self,
        maps: Sequence[Tensor],
        boxes: list[Tensor],
        masks: list[Tensor],
        labels: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The weighted losses of true boxes, drawn and jittered where asked for; further arguments as in `loss`.

        Args:
            labels: N tensors (M,), the class of each box, which a class head needs.

        Returns:
            ``loss_mask``, and with a class head ``loss_class``.
        """
        if labels is None:
            labels = [torch.zeros(len(b), dtype=torch.long, device=b.device) for b in boxes]
        limit, amount = self.settings.cells_per_image, self.settings.box_jitter
        generators = generators_of_images(len(boxes)) if limit or amount else []
        if limit:
            drawn = [torch.randperm(len(b), generator=g)[:limit] for b, g in zip(boxes, generators, strict=True)]
            boxes = [b[index.to(b.device)] for b, index in zip(boxes, drawn, strict=True)]
            masks = [m[index.to(m.device)] for m, index in zip(masks, drawn, strict=True)]
            labels = [of_image[index.to(of_image.device)] for of_image, index in zip(labels, drawn, strict=True)]
        if amount:
            boxes = [
                jittered_boxes(b, (m.shape[1], m.shape[2]), amount, g)
                for b, m, g in zip(boxes, masks, generators, strict=True)
            ]
        of_masks, of_classes = self._losses(maps, boxes, masks, labels)
        losses = {"loss_mask": self.settings.mask_weight * of_masks}
        return losses | ({} if of_classes is None else {"loss_class": of_classes})

    def loss(self, maps: Sequence[Tensor], boxes: list[Tensor], masks: list[Tensor]) -> Tensor:
        """Mask loss of boxes; each crop's target is the mask of its cell alone.

        Args:
            maps: as in `forward`.
            boxes: N tensors (M, 4).
            masks: N tensors (M, H, W), bool, input pixels (unpadded size).
        """
        return self._losses(maps, boxes, masks, None)[0]

    @torch.no_grad()
    def candidates(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a confidence head is fitted to, of boxes that were found in one image.

        Args:
            maps: L maps (1, C, h, w) at strides 1, 2, 4, ...
            boxes: (R, 4), xyxy continuous, input pixels.
            labels: (H, W) int64, the true cells 1..M, 0 background; input pixels.

        Returns:
            The head's inputs (R, C + 2), and the highest intersection over union (R,) of the mask in each box with a
            true one.
        """
        (boxes,) = self._with_margin([boxes], [(labels.shape[0], labels.shape[1])])
        logits, windows, features = packed_logits(self, maps, [boxes])
        inside = logits.sigmoid() > self.settings.mask_threshold
        return head_inputs(features[:, self.confidence_sees], window_sizes(windows)), best_ious(inside, windows, labels)

    def _losses(
        self, maps: Sequence[Tensor], boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The losses of masks, and of classes where there are labels and a head to tell them."""
        # Crops of weight 0 that begin at each of the levels: all parameters take part in every step, which distributed
        # training needs, and a batch without cells has a loss.
        sides = 2 ** torch.arange(1, len(maps) + 1)
        everywhere = torch.stack((sides * 0, sides * 0, sides, sides), dim=1).to(boxes[0])
        logits, windows, features = packed_logits(self, maps, [torch.cat((everywhere, boxes[0])), *boxes[1:]])
        skipped = int(window_sizes(windows[: len(sides)]).prod(1).sum())
        zero = 0 * for_losses(logits[:skipped]).sum()
        windows, logits = windows[len(sides) :], logits[skipped:]
        crops = loss_divisor(torch.tensor([len(windows)], device=logits.device))[0]  # of all processes: before a return
        of_classes = None
        if self.class_head is not None and labels is not None:
            class_logits = self.class_head(features)
            everywhere_logits, class_logits = class_logits[: len(sides)], class_logits[len(sides) :]
            of_classes = self.class_head.loss(class_logits, torch.cat(labels)) + 0 * everywhere_logits.sum()
        if not len(windows):
            return zero, of_classes
        return mask_loss(logits, _mask_pixels(masks, windows), window_sizes(windows).prod(1), crops) + zero, of_classes


def build_segmentation_branch(
    settings: SegmentationSettings,
    in_channels: Sequence[int],
    widths: Sequence[int],
    lowest: int,
    classes: ClassSettings | None = None,
) -> SegmentationBranch:
    """The branch on c0..c4 with channels ``in_channels``, or on s1; ``lowest`` is the lowest scale of the trunk.

    Raises:
        ValueError: ``cut_from`` "s1" where the trunk does not go up to s1.
    """
    if settings.cut_from == "features":
        return SegmentationBranch(in_channels, widths, settings, classes)
    require(lowest == 1, "cut_from", "features, for 's1' needs scale 1, and the lowest scale is " + str(lowest), "s1")
    return SegmentationBranch(widths[:1], widths[:1], settings, classes)


def mask_loss(logits: Tensor, targets: Tensor, areas: Tensor, crops: Tensor | None = None) -> Tensor:
    """Binary cross entropy of mask crops: mean over the pixels of a crop, then over the crops.

    Args:
        logits: (P,), the pixels of M crops, one crop after another.
        targets: (P,), bool or 0..1.
        areas: (M,) int64, pixels of each crop, M > 0.
        crops: number to divide by instead of M, where these crops are not all.
    """
    areas, logits = areas.to(logits.device), for_losses(logits)
    weight = (1 / areas.to(logits)).repeat_interleave(areas, output_size=len(logits))
    total = binary_cross_entropy_with_logits(logits, targets.to(logits), weight, reduction="sum")
    return total / (len(areas) if crops is None else crops.to(total))


def jittered_boxes(
    boxes: Tensor, size: tuple[int, int], amount: float, generator: torch.Generator | None = None
) -> Tensor:
    """Boxes that are off as decoded ones are: each edge moved at random, uniformly by up to `amount` of the box's side.

    Args:
        boxes: (M, 4), xyxy continuous, input pixels.
        size: (H, W) of the image, which the result stays in.
        amount: fraction of the width (left, right) or height (top, bottom), at least 0 and below 0.5, so that edges
            never cross.
        generator: source of the randomness, on the CPU; PyTorch's global one by default.

    Returns:
        (M, 4)
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    random = torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype).to(boxes)
    moved = boxes + (2 * random - 1) * amount * sides
    return clip_boxes(moved, size)


def _mask_pixels(masks: list[Tensor], windows: Tensor) -> Tensor:
    """Masks, N tensors (M,H,W), inside the windows [R,4] of all cells -> [P]."""
    pixels = torch.cat([m.flatten() for m in masks])
    counts = torch.tensor([len(m) for m in masks])
    height, width = torch.tensor([m.shape[1:] for m in masks]).repeat_interleave(counts, dim=0).unbind(1)
    first = (height * width).cumsum(0) - height * width + windows[:, 1] * width + windows[:, 0]
    crop, y, x = crop_pixels(window_sizes(windows), pixels.device)
    return pixels[first.to(pixels.device)[crop] + y * width.to(pixels.device)[crop] + x]
