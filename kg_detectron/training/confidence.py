"""Fit the confidence head of a trained network to the boxes that it finds in labelled images. Ours.

The network stays as it is. What it finds in images that are shown a little changed, and how well each mask fits, is
kept in memory; on that the head then learns within seconds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.confidence import ConfidenceHead, worth
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings, random_colours
from kg_detectron.training.dataset import LabelledImage
from kg_detectron.training.seeds import generator_of_sample, order_of_epoch

# Images that are looked at, each time changed at random, and boxes of each that are taken at most.
VIEWS = 200
_CANDIDATES = 512
# Settings of the ranking, `RankingSettings`, beside a head that is fitted to a network that was trained without.
RANKING = {"vote_exponent": 0.5, "blur_weight": 0.0}
# Largest side of the part of an image that is looked at, pixels of the network's input.
_WINDOW = 640
# A view is 2^u times as large as in a prediction, u uniform within -narrow..narrow; with the wide share within
# -wide..wide, for a network whose scale is searched for: the search shows it the cells at wrong scales.
_GEOMETRY = GeometrySettings()
_COLOURS = ColourSettings(
    inversion=0, grey=0, tint=0, permutation=0, stain=0, dyes=0, haematoxylin=0, section=0, illumination=0, blur=0
)
# The head sees each box about so many times: less, and it learns too little, more, and it learns them by heart.
_TIMES, _LEAST_STEPS, _BATCH = 6, 1000, 256
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2


def fit_confidence(model: InstanceNet, images: Sequence[LabelledImage], seed: int = 0, views: int = VIEWS) -> int:
    """Fit the confidence head of a trained network, in place; a network without one stays as it is.

    Args:
        model: its mode is restored.
        images: labelled images, those of its training.
        seed: of the draws, and of the head's first weights.
        views: see `VIEWS`.

    Returns:
        The number of boxes that the head was fitted to; where none is found, it stays as it is.

    Raises:
        ValueError: there are no images.
    """
    if not isinstance(model, KeypointGraphNet) or model.segmentation.confidence_head is None:
        return 0
    if not images:
        raise ValueError("images: expected at least one, got none")
    training = model.training
    model.eval()
    with tqdm(range(views), desc="confidence", unit="view") as positions:
        parts = [_candidates(model, images, seed, position) for position in positions]
    model.train(training)
    inputs, ious = (torch.cat(part) for part in zip(*parts, strict=True))
    if len(inputs):
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            torch.manual_seed(seed)
            _fit(model.segmentation.confidence_head, inputs, worth(ious))
    return len(inputs)


@torch.no_grad()
def _candidates(
    model: KeypointGraphNet, images: Sequence[LabelledImage], seed: int, position: int
) -> tuple[Tensor, Tensor]:
    """What `SegmentationBranch.candidates` gives of some of the boxes that are found in a view."""
    epoch, place = divmod(position, len(images))
    generator = generator_of_sample(seed, position)
    source = images[order_of_epoch(seed, epoch, len(images))[place]]
    image, labels = _view(model, source, generator)
    maps, crop_maps = model.maps(model.batch([image]))
    (boxes,), _ = model.boxes(maps, [labels.shape])
    drawn = torch.from_numpy(generator.permutation(len(boxes))[:_CANDIDATES]).to(boxes.device)
    truth = torch.from_numpy(labels.astype(np.int64)).to(boxes.device)
    return model.segmentation.candidates(crop_maps, boxes[drawn], truth)


def _view(model: KeypointGraphNet, source: LabelledImage, generator: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """(3, h, w) of 0..255, and its labels (h, w): a labelled image about as a prediction shows it to the network,
    turned and mirrored at random, with other levels."""
    settings, shape = model.preprocessing, source.labels.shape
    fixed = settings.training_scale(shape)
    if fixed is None:
        value: float | tuple[int, int] = settings.predicted_diameter / source.diameter if source.diameter else 1.0
    else:
        value = fixed.value
    scales = [one / side for one, side in zip(value, shape, strict=True)] if isinstance(value, tuple) else [value] * 2
    wide = fixed is None and generator.random() < _GEOMETRY.wide_share
    octaves = _GEOMETRY.wide if wide else _GEOMETRY.narrow
    factor = 2 ** generator.uniform(-octaves, octaves)
    # The part is cut out first: the whole image may be too large to be enlarged.
    cut = [min(side, round(_WINDOW / (scale * factor))) for side, scale in zip(shape, scales, strict=True)]
    corner = [int(generator.integers(side - part + 1)) for side, part in zip(shape, cut, strict=True)]
    window = tuple(slice(low, low + part) for low, part in zip(corner, cut, strict=True))
    height, width = (max(1, round(part * scale * factor)) for part, scale in zip(cut, scales, strict=True))
    image = resize_image(source.image[window].astype(np.float32), (height, width))
    labels = resize_labels(source.labels[window], (height, width))
    turns, mirrored = int(generator.integers(4)), bool(generator.integers(2))
    image, labels = (np.rot90(part, turns)[:, :: -1 if mirrored else 1] for part in (image, labels))
    image = random_colours(np.ascontiguousarray(image), _COLOURS, generator)
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return tensor.to(model.place), np.ascontiguousarray(labels)


def _fit(head: ConfidenceHead, inputs: Tensor, targets: Tensor) -> None:
    """Fit a head, from new weights, to its inputs (R, C + 2), and the confidence (R,) that is right for each."""
    head.mean.copy_(inputs.mean(0))
    head.deviation.copy_(inputs.std(0, unbiased=False).clamp(min=1e-3))
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    steps = max(_LEAST_STEPS, _TIMES * len(inputs) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        drawn = torch.randint(len(inputs), (_BATCH,)).to(inputs.device)
        loss = binary_cross_entropy_with_logits(head.logits(inputs[drawn]), targets[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.requires_grad_(False)
