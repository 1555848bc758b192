"""The whole model: keypoint graph to boxes, and a mask in each box."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.modeling.backbone import ResNetC4, pad_to_batch
from kg_detectron.modeling.keypoint_graph.decoding import KeypointDecoder
from kg_detectron.modeling.keypoint_graph.heads import KeypointBranch, KeypointMaps
from kg_detectron.modeling.keypoint_graph.lite import LiteHeads, LiteStep
from kg_detectron.modeling.keypoint_graph.losses import keypoint_losses
from kg_detectron.modeling.packed_crops import SegmentationBranch
from kg_detectron.modeling.precision import autocast, check_precision, full_precision
from kg_detectron.modeling.ranking import CellRanking


def segmentation_branch(
    segmentation: str,
    backbone_channels: Sequence[int],
    widths: Sequence[int],
    scales: Sequence[int],
    pixels_in_flight: int,
    margin: float,
) -> SegmentationBranch:
    """The branch on c0..c4 (``"branch"``), or on the decoder map s1 alone (``"s1"``, the paper's `seg s1`).

    Raises:
        ValueError: for another name, or ``"s1"`` where s1 is not among the scales, for then there is no such map.
    """
    if segmentation == "branch":
        return SegmentationBranch(backbone_channels, widths, pixels_in_flight, margin)
    if segmentation == "s1":
        if 1 not in scales:
            raise ValueError(f"segmentation: 's1' needs scale 1, but the scales are {tuple(scales)}")
        return SegmentationBranch(widths[:1], widths[:1], pixels_in_flight, margin)
    raise ValueError(f"segmentation: expected 'branch' or 's1', got {segmentation!r}")


def build_keypoint_branch(
    branch: str, in_channels: Sequence[int], widths: Sequence[int], head_kernel: int, scales: Sequence[int], norm: str
) -> KeypointBranch:
    """The paper's branch (``"paper"``), or ours of few operations (``"lite"``), whose norm layer is `norm`.

    Raises:
        ValueError: for another name, or arguments that do not fit.
    """
    if branch == "paper":
        return KeypointBranch(in_channels, widths, head_kernel, scales)
    if branch == "lite":
        step, heads = partial(LiteStep, kernel=head_kernel, norm=norm), partial(LiteHeads, norm=norm)
        return KeypointBranch(in_channels, widths, head_kernel, scales, step, heads)
    raise ValueError(f"branch: expected 'paper' or 'lite', got {branch!r}")


class KeypointGraphNet(nn.Module):
    """Keypoint-graph instance segmentation, with the calling convention of torchvision's detection models.

    In training ``model(images, targets)`` returns a dict of losses; in evaluation ``model(images)`` returns a list of
    dicts. The defaults are the paper's network.

    Args:
        depth: of the ResNet, 18, 34 or 50.
        norm: norm layer of the ResNet: BN, FrozenBN, SyncBN or GN.
        weights: initial weights of the ResNet, a member of torchvision's weight enum, or None for random ones.
        c0_channels: channels of c0.
        branch: keypoint branch, "paper" or "lite".
        widths: channels of the decoder maps s1..s4, and of the segmentation branch.
        head_kernel: kernel size of the keypoint heads.
        scales: scales with keypoint heads, of 1, 2, 3, 4.
        segmentation: "branch", or "s1" for the paper's `seg s1`.
        radius: disc radius r, pixels of each scale.
        min_side, heatmap_weight, single_offset_weight, group_offset_weight: see `keypoint_losses`.
        mask_weight: of the mask loss.
        smooth_sigma, peak_threshold, hops, corner_and_centre, nms_threshold: see `KeypointDecoder`.
        blur_weight, overlap_sigma: see `CellRanking`.
        pixels_in_flight, mask_margin: see `SegmentationBranch`.
        mask_threshold: probability from which a pixel belongs to the cell.
        pixel_mean, pixel_std: the network sees (image - mean) / std, per channel.
        normalisation, percentiles: how the levels of images become 0..255 before the network sees them, "fixed" or
            "percentile"; see `kg_detectron.io.normalisation`. The network itself only keeps them, as its users
            must normalise as was done in training.
        input_size: height and width to which images are resized for prediction, as they were in training. The network
            itself takes any size.
    """

    def __init__(
        self,
        *,
        depth: int = 50,
        norm: str = "BN",
        weights: str | None = None,
        c0_channels: int = 64,
        branch: str = "paper",
        widths: Sequence[int] = (64, 64, 256, 512),
        head_kernel: int = 7,
        scales: Sequence[int] = (1, 2, 3, 4),
        segmentation: str = "branch",
        radius: float = 5.0,
        min_side: float | None = None,
        heatmap_weight: float = 1.0,
        single_offset_weight: float = 1.0,
        group_offset_weight: float = 0.25,
        mask_weight: float = 1.0,
        smooth_sigma: float = 2.0,
        peak_threshold: float = 0.004,
        hops: int = 1,
        corner_and_centre: bool = False,
        nms_threshold: float = 0.5,
        blur_weight: float = 0.0,
        overlap_sigma: float = 0.0,
        pixels_in_flight: int = 2**18,
        mask_margin: float = 0.0,
        mask_threshold: float = 0.5,
        pixel_mean: Sequence[float] = (127.5, 127.5, 127.5),
        pixel_std: Sequence[float] = (255.0, 255.0, 255.0),
        normalisation: str = "fixed",
        percentiles: Sequence[float] = (1.0, 99.8),
        input_size: Sequence[int] = (512, 512),
    ) -> None:
        super().__init__()
        # What a model file needs to build the network again.
        self.arguments = {
            name: value for name, value in locals().items() if name not in ("self", "weights", "__class__")
        }
        self.backbone = ResNetC4(depth, norm, c0_channels, weights)
        self.keypoint_branch = build_keypoint_branch(branch, self.backbone.channels, widths, head_kernel, scales, norm)
        self.decoder = KeypointDecoder(radius, smooth_sigma, peak_threshold, hops, corner_and_centre, nms_threshold)
        self.mask_head = segmentation_branch(
            segmentation, self.backbone.channels, widths, scales, pixels_in_flight, mask_margin
        )
        self.ranking = CellRanking(blur_weight, overlap_sigma)
        self.segmentation = segmentation
        self.losses = {
            "min_side": min_side,
            "heatmap_weight": heatmap_weight,
            "single_offset_weight": single_offset_weight,
            "group_offset_weight": group_offset_weight,
        }
        self.mask_weight = mask_weight
        self.mask_threshold = mask_threshold
        self.normalisation = normalisation
        self.percentiles = tuple(percentiles)
        self.input_size = tuple(input_size)
        self.precision = "float32"
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(-1, 1, 1), persistent=False)

    def accelerate(
        self, precision: str = "float32", channels_last: bool = False, compiled: bool = False
    ) -> "KeypointGraphNet":
        """Set how the model runs in evaluation, in place, and return the model. Decoding runs in float32 in any case.

        Args:
            precision: of the convolutions: "float32", "bfloat16" or "float16"; the last is for GPUs, and takes CPUs
                without such instructions up to a hundred times as long.
            channels_last: keep the maps with the channels last: faster on CPUs, and on GPUs in half precision.
            compiled: let `torch.compile` compile backbone and keypoint branch, for good: a minute at the first image,
                and a C++ compiler at hand.

        Raises:
            ValueError: for another precision.
        """
        self.precision = check_precision(precision)
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if compiled:
            self.backbone.compile()
            self.keypoint_branch.compile()
        return self

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor | MaskCrops]]:
        """Losses in training, detections in evaluation.

        Args:
            images: N tensors (3,H,W), BGR, 0..255, sizes may differ.
            targets: in training, for each image a dict with ``boxes`` (M,4), xyxy continuous input pixels, and
                ``masks`` (M,H,W), bool.

        Returns:
            In training: ``loss_heatmap``, ``loss_single_offset``, ``loss_group_offset``, ``loss_mask``.
            In evaluation, for each image: ``boxes`` (R,4), ``scores`` (R,) falling, ``labels`` (R,) int64, all 1,
            ``masks`` (`MaskCrops` of length R, probabilities).

        Raises:
            ValueError: for images or targets that do not have these shapes.
        """
        _check_images(images)
        batch = self.normalised_batch(images)
        if self.training:
            boxes, masks = _check_targets(images, targets)
            maps, crop_from = self._dense(batch)
            losses = keypoint_losses(maps, boxes, batch.shape[2:], self.decoder.radius, **self.losses)
            return losses | {"loss_mask": self.mask_weight * self.mask_head.loss(crop_from, boxes, masks)}

        sizes = [tuple(image.shape[1:]) for image in images]
        with autocast(self.precision, batch.device):
            maps, crop_from = self._dense(batch)
            with full_precision(batch.device):
                detections = self.decoder(maps, sizes)
            boxes = [own for own, _ in detections]
            masks = self.mask_head.predict_masks(crop_from, boxes, sizes, self.mask_threshold)
        results = []
        for (own, scores), mask in zip(detections, masks, strict=True):
            own = self.mask_head.cell_boxes(own, mask)
            order, scores = self.ranking(own, scores, mask)
            labels = torch.ones_like(scores, dtype=torch.long)
            results.append({"boxes": own[order], "scores": scores, "labels": labels, "masks": mask[order]})
        return results

    def normalised_batch(self, images: list[Tensor]) -> Tensor:
        """What the backbone sees of images (3,H,W), 0..255: normalised, padded and stacked, see `pad_to_batch`."""
        return pad_to_batch([(image.float() - self.pixel_mean) / self.pixel_std for image in images])

    def _dense(self, batch: Tensor) -> tuple[list[KeypointMaps], list[Tensor]]:
        """Images (N,3,H,W), normalised -> the keypoint maps of each scale, and the maps that masks are cut from."""
        features = self.backbone(batch)
        maps, decoded = self.keypoint_branch(features)
        return maps, features if self.segmentation == "branch" else [decoded["s1"]]


def _check_images(images: list[Tensor]) -> None:
    if not images:
        raise ValueError("images: expected at least one image, got an empty list")
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}]: expected shape (3,H,W), got {tuple(image.shape)}")


def _check_targets(images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> tuple[list[Tensor], list[Tensor]]:
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else len(targets)
        raise ValueError(f"targets: training needs one dict for each of {len(images)} images, got {got}")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        boxes, masks = target["boxes"], target["masks"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"targets[{i}]['boxes']: expected shape (M,4), got {tuple(boxes.shape)}")
        if tuple(masks.shape) != (len(boxes), *image.shape[1:]):
            expected = (len(boxes), *image.shape[1:])
            raise ValueError(f"targets[{i}]['masks']: expected shape {expected}, got {tuple(masks.shape)}")
    return [target["boxes"] for target in targets], [target["masks"] for target in targets]
