"""From peaks to keypoint graphs (paper, section 2.1, step 2)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph import DIRECTED_EDGES, NUM_KEYPOINTS
from ..checks import check_gathering, check_grouping, check_positions


@torch.no_grad()
def gather_displacements(
    peaks: Tensor, group_offsets: Sequence[Tensor], edges: Sequence[tuple[int, int]] = DIRECTED_EDGES
) -> Tensor:
    """`layers.gather_displacements`: peaks (P, 4) and maps (N, 2E, H, W) of each scale -> (P, 4, 2)."""
    check_gathering(peaks, group_offsets, edges)
    n, device = len(group_offsets[0]), peaks.device
    displacements = group_offsets[0].new_full((len(peaks), NUM_KEYPOINTS - 1, 2), math.nan)
    for scale, offsets in enumerate(group_offsets):
        limit = torch.tensor([n, NUM_KEYPOINTS, *offsets.shape[2:]], device=device)
        pixels = peaks - torch.tensor([n * scale, 0, 0, 0], device=device)
        inside = ((pixels >= 0) & (pixels < limit)).all(1)
        for e, (k, l) in enumerate(edges):
            of_edge = inside & (pixels[:, 1] == k)
            image, _, y, x = pixels[of_edge].unbind(1)
            displacements[of_edge, l if l < k else l - 1] = offsets[image, 2 * e : 2 * e + 2, y, x]
    return displacements


@torch.no_grad()
def group_keypoints(
    peaks: Tensor,
    scores: Tensor,
    group_offsets: Tensor,
    match_radius: float = 6,
    reject_radius: float = 10,
    hops: int = 1,
) -> tuple[Tensor, Tensor]:
    """`layers.group_keypoints`: peaks (P, 4), scores (P,) and maps (N, 40, H, W) -> graphs (G, 5, 3), image (G,)."""
    displacements = gather_displacements(peaks, [group_offsets])
    check_positions(peaks, group_offsets)
    return group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)


@torch.no_grad()
def group_peaks(
    peaks: Tensor,
    scores: Tensor,
    displacements: Tensor,
    match_radius: float = 6,
    reject_radius: float = 10,
    hops: int = 1,
) -> tuple[Tensor, Tensor]:
    """`layers.group_peaks`: peaks (P, 4), scores (P,), displacements (P, 4, 2) -> graphs (G, 5, 3), image (G,)."""
    check_grouping(peaks, scores, displacements, match_radius, reject_radius, hops)
    limit = torch.tensor([2**63 - 1, NUM_KEYPOINTS, 2**31, 2**31], device=peaks.device)
    if len(peaks) and bool(((peaks < 0) | (peaks >= limit)).any()):
        raise ValueError(
            "peaks: expected image, keypoint below 5, and y, x below 2^31, none negative, "
            f"got {peaks.amin(0).tolist()} to {peaks.amax(0).tolist()}"
        )

    # The graphs are few and each step depends on the last, so the loop runs on the host, over distances by type.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    image, keypoint, y, x = peaks.cpu().unbind(1)
    place, displacement = torch.stack((x, y), dim=1).double(), displacements.double().cpu()
    score = scores.to(dtype).cpu()
    graphs: list[Tensor] = []
    graph_image: list[int] = []
    for i in image.unique().tolist():
        of = image == i
        graphs_of_image = _group_one_image(
            keypoint[of], place[of], score[of], displacement[of], match_radius, reject_radius, hops
        )
        graphs += graphs_of_image
        graph_image += [i] * len(graphs_of_image)
    if not graphs:
        return scores.new_zeros((0, NUM_KEYPOINTS, 3), dtype=dtype), peaks.new_zeros((0,))
    return torch.stack(graphs).to(peaks.device), torch.tensor(graph_image, device=peaks.device)


def _group_one_image(
    keypoint: Tensor,
    place: Tensor,
    score: Tensor,
    displacement: Tensor,
    match_radius: float,
    reject_radius: float,
    hops: int,
) -> list[Tensor]:
    """Graphs (5, 3) of P peaks in their order.

    Args:
        keypoint: (P,) their types.
        place: (P, 2) x, y.
        score: (P,).
        displacement: (P, 4, 2) x, y towards the other types.
        match_radius, reject_radius, hops: see `layers.group_peaks`.
    """
    members = [(keypoint == k).nonzero()[:, 0] for k in range(NUM_KEYPOINTS)]  # the peaks of each type
    rank = torch.zeros(len(place), dtype=torch.long)  # of a peak among those of its type
    for m in members:
        rank[m] = torch.arange(len(m))
    queued = [torch.ones(len(m), dtype=torch.bool) for m in members]
    rejected = [torch.zeros(len(m), dtype=torch.bool) for m in members]

    def squared_distance(k: int, point: Tensor) -> Tensor:
        return (place[members[k]] - point).square().sum(1)

    def join(graph: Tensor, p: int) -> None:
        k = int(keypoint[p])
        queued[k][rank[p]] = False
        rejected[k] |= squared_distance(k, place[p]) <= reject_radius**2
        graph[k, :2], graph[k, 2] = place[p], score[p]

    def partner(source: int, l: int) -> int | None:
        other = l if l < keypoint[source] else l - 1  # its place among those other than the source's own type
        squared = squared_distance(l, place[source] + displacement[source, other])
        squared = torch.where(queued[l] & (squared <= match_radius**2), squared, math.inf)
        if not len(squared) or squared.min() == math.inf:
            return None
        return int(members[l][squared.argmin()])

    graphs = []
    for start, k in enumerate(keypoint.tolist()):
        if not queued[k][rank[start]]:
            continue
        queued[k][rank[start]] = False
        if rejected[k][rank[start]]:
            continue
        graph = torch.zeros(NUM_KEYPOINTS, 3, dtype=score.dtype)
        join(graph, start)
        joined, missing = [], []
        for l in range(NUM_KEYPOINTS):
            if l == k:
                continue
            nearest = partner(start, l)
            if nearest is None:
                missing.append(l)
            else:
                join(graph, nearest)
                joined.append(nearest)
        if hops == 2:
            joined.sort(key=lambda p: -float(score[p]))
            for l in missing:
                nearest = next((p for p in (partner(source, l) for source in joined) if p is not None), None)
                if nearest is not None:
                    join(graph, nearest)
        graphs.append(graph)
    return graphs
