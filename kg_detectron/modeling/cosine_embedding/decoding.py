"""From embeddings to cells: foreground, clusters, connected pieces."""

import numpy as np
import skimage
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kg_detectron.cells import Cells
from kg_detectron.modeling.cosine_embedding.clustering import hdbscan, mean_shift
from kg_detectron.modeling.cosine_embedding.settings import ClusteringSettings
from kg_detectron.modeling.label_maps import cells_of_labels


@torch.no_grad()
def decode_embedding(
    embedding: Tensor, background: Tensor | None, stride: int, size: tuple[int, int], settings: ClusteringSettings
) -> Cells:
    """The cells of one image.

    Args:
        embedding: (D, h, w).
        background: (h, w), the learned probability of the background; None takes the squared cosine between the
            embedding and the image's median.
        stride: of the maps.
        size: (H, W) of the image, input pixels, without the padding.
        settings: of the steps.

    Returns:
        The cells. Their scores are the mean cosine of their pixels with their mean embedding, times the mean of 1 -
        background.
    """
    height, width = (-(-side // stride) for side in size)
    unit = normalize(embedding[:, :height, :width], dim=0)
    if background is None:
        median = normalize(unit.flatten(1).median(dim=1)[0], dim=0)
        background = torch.einsum("dhw,d->hw", unit, median).square()
    background = background[:height, :width]
    foreground = background < settings.background_threshold
    labels = cluster_labels(unit, foreground, stride, settings)
    scores = embedding_scores(unit, background, labels)
    large = labels.repeat(stride, axis=0).repeat(stride, axis=1)[: size[0], : size[1]]
    return cells_of_labels(large, scores)


def cluster_labels(unit: Tensor, foreground: Tensor, stride: int, settings: ClusteringSettings) -> np.ndarray:
    """Labels (h, w), 0 background, 1..K: the connected pieces of the clusters.

    Args:
        unit: (D, h, w) embeddings of unit length.
        foreground: (h, w) bool.
        stride: of the maps.
        settings: of the steps.
    """
    place = foreground.nonzero()
    features = torch.cat((unit[:, foreground].T, settings.coordinate_weight * stride * place.to(unit)), dim=1)
    least = max(1, settings.min_area // stride**2)
    if settings.clustering == "hdbscan":
        clusters = hdbscan(features, max(2, least))
    else:
        clusters = mean_shift(features, settings.bandwidth, settings.seeds)
    inside = foreground.cpu().numpy()
    map_of_clusters = np.zeros(inside.shape, np.int64)
    map_of_clusters[inside] = clusters.cpu().numpy() + 1
    pieces = skimage.measure.label(map_of_clusters, background=0, connectivity=1)
    areas = np.bincount(pieces.ravel())
    numbers = np.flatnonzero(areas[1:] >= least) + 1
    number = np.zeros(len(areas), np.int32)
    number[numbers] = np.arange(1, len(numbers) + 1)
    # What is too small to be a cell, mostly the rim of one, belongs to a cell that it touches.
    return skimage.segmentation.watershed(np.zeros(inside.shape), number[pieces], mask=inside)


def embedding_scores(unit: Tensor, background: Tensor, labels: np.ndarray) -> Tensor:
    """The scores (K,) of labels 1..K, see `decode_embedding`."""
    count = int(labels.max(initial=0))
    instance = torch.from_numpy(labels.astype(np.int64)).to(unit.device).flatten()
    pixels = unit.flatten(1).T
    sums = pixels.new_zeros(count + 1, len(unit)).index_add(0, instance, pixels)
    cosine = (pixels * normalize(sums, dim=1)[instance]).sum(1)
    # The means over the pixels of each label.
    values = torch.stack((cosine, 1 - background.flatten()), dim=1)
    means = values.new_zeros(count + 1, 2).index_add(0, instance, values)
    means = means / instance.bincount(minlength=count + 1).clamp(min=1)[:, None]
    return means[1:].prod(1).clamp(0, 1)
