"""Clusters of pixels by their features: mean shift, or HDBSCAN.

P pixels, F features, S seeds.
"""

import importlib

import numpy as np
import torch
from torch import Tensor

# The mean shift ends after so many steps, or where no seed moves.
_STEPS = 20


def mean_shift(features: Tensor, bandwidth: float, seeds: int) -> Tensor:
    """Mean shift with a flat kernel, from some of the points.

    Each seed moves to the mean of the points within the bandwidth, again and again. Of seeds that end within the
    bandwidth of each other, the one with most points is a cluster's centre. Every point goes to the nearest centre.

    Args:
        features: (P, F).
        bandwidth: radius of the kernel.
        seeds: number of points, evenly spread over the rows, to start from.

    Returns:
        (P,) int64, clusters 0, 1, ..., those of most points near their centre first.
    """
    if not len(features):
        return torch.zeros(0, dtype=torch.int64, device=features.device)
    start = torch.linspace(0, len(features) - 1, min(seeds, len(features))).round().long()
    centres = features[start.to(features.device)]
    for _ in range(_STEPS):
        within = (torch.cdist(centres, features) <= bandwidth).to(features)  # [S,P]
        count = within.sum(1, keepdim=True)
        moved = torch.where(count > 0, within @ features / count.clamp(min=1), centres)
        still = bool((moved - centres).abs().max() < 1e-3 * bandwidth)
        centres = moved
        if still:
            break
    count = (torch.cdist(centres, features) <= bandwidth).sum(1)
    left = count.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        kept.append(left[0])
        left = left[(centres[left] - centres[left[0]]).norm(dim=1) > bandwidth]
    return torch.cdist(features, centres[torch.stack(kept)]).argmin(1)


def hdbscan(features: Tensor, min_size: int) -> Tensor:
    """HDBSCAN of scikit-learn: (P, F) -> (P,) int64 clusters, -1 for noise.

    Args:
        features: (P, F).
        min_size: points of the smallest cluster, and of the neighbourhood whose size tells the density; 2 or more.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        cluster = importlib.import_module("sklearn.cluster")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "clustering: 'hdbscan' needs scikit-learn, install kg_detectron[clustering], or take 'mean_shift'"
        ) from error
    if len(features) < min_size:
        return torch.full((len(features),), -1, device=features.device)
    method = cluster.HDBSCAN(min_cluster_size=min_size, min_samples=min_size, copy=True)
    found = method.fit_predict(features.cpu().numpy())
    return torch.from_numpy(found.astype(np.int64)).to(features.device)
