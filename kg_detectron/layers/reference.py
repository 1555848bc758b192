"""The keypoint-graph operators in plain PyTorch: the specification, and the fallback where nothing was compiled.

Letters: N images, K keypoint types, H x W pixels of one scale, P peaks, G graphs, R boxes. x points right, y down;
coordinates are pixel indices of that scale. Nothing here but `convolve_resized` is differentiable.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import (
    BOTTOM,
    CENTRE,
    DIRECTED_EDGES,
    EDGE_INDEX,
    GROUP_OFFSET_CHANNELS,
    LEFT,
    NUM_KEYPOINTS,
    RIGHT,
    SINGLE_OFFSET_CHANNELS,
    TOP,
)
from .checks import (
    check_crops,
    check_gathering,
    check_graphs,
    check_grouping,
    check_positions,
    check_smoothing,
    check_threshold,
    check_votes,
)


@torch.no_grad()
def hough_vote(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    """Hough voting (paper, equation 2).

    Every pixel x casts its heatmap probability to x + s(x), bilinearly, scaled by 1 / (pi radius^2). Votes that land
    outside the map are dropped, corner by corner; a value or an offset that is not finite casts no vote.

    Args:
        heatmap: (N,K,H,W) probabilities.
        offsets: (N,2K,H,W) single offsets, channels 2k, 2k+1 = x, y, in pixels.
        radius: disc radius, pixels.

    Returns:
        (N,K,H,W) keypoint scores, float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes, types or a radius that do not fit.
    """
    check_votes(heatmap, offsets, radius)
    n, k, h, w = heatmap.shape
    dtype = torch.promote_types(heatmap.dtype, torch.float32)
    value = heatmap.to(dtype)
    offset = offsets.to(dtype).reshape(n, k, 2, h, w)
    x = torch.arange(w, device=value.device, dtype=dtype) + offset[:, :, 0]
    y = torch.arange(h, device=value.device, dtype=dtype)[:, None] + offset[:, :, 1]
    lands = torch.isfinite(value) & (x > -1) & (x < w) & (y > -1) & (y < h)  # false for nan too
    plane, value, x, y = lands.reshape(n * k, h * w).nonzero()[:, 0], value[lands], x[lands], y[lands]

    votes = value.new_zeros(n * k * h * w)
    left, top = x.floor(), y.floor()
    dx, dy = x - left, y - top
    left, top = left.long(), top.long()
    for column, row, weight in (
        (left, top, (1 - dx) * (1 - dy)),
        (left + 1, top, dx * (1 - dy)),
        (left, top + 1, (1 - dx) * dy),
        (left + 1, top + 1, dx * dy),
    ):
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        index = (plane * h + row) * w + column
        votes.index_add_(0, index[inside], (value * weight)[inside])
    return votes.reshape(n, k, h, w) / (math.pi * radius**2)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Half-sample symmetric continuation (scipy's border `reflect`), for any distance from the border."""
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


@torch.no_grad()
def smooth_votes(votes: Tensor, sigma: float) -> Tensor:
    """Gaussian of the votes: half-sample symmetric border, truncated at 4 sigma.

    Args:
        votes: (N,K,H,W).
        sigma: standard deviation, pixels; 0 returns the votes as they are.

    Returns:
        (N,K,H,W), float32 (float64 for float64 input).
    """
    check_smoothing(votes, sigma)
    n, k, h, w = votes.shape
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    if sigma == 0 or votes.numel() == 0:
        return votes
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, device=votes.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(votes.dtype)
    planes = votes.reshape(n * k, 1, h, w)
    rows = _reflect(torch.arange(-reach, h + reach, device=votes.device), h)
    planes = torch.nn.functional.conv2d(planes[:, :, rows], kernel.reshape(1, 1, -1, 1))
    columns = _reflect(torch.arange(-reach, w + reach, device=votes.device), w)
    planes = torch.nn.functional.conv2d(planes[..., columns], kernel.reshape(1, 1, 1, -1))
    return planes.reshape(n, k, h, w)


@torch.no_grad()
def find_peaks(scores: Tensor | Sequence[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """Local maxima of the score maps (paper, section 2.1, step 2).

    A peak is a pixel that is above the threshold and equal to the maximum of its 4-neighbourhood. Values that are not
    finite are no peaks and hide none.

    Args:
        scores: (N,K,H,W), or a sequence of them, one for each scale.
        threshold: peaks are strictly above it.

    Returns:
        peaks: (P,4) int64, columns image, keypoint, y, x; ordered by image, then falling score, then keypoint, y, x.
            Of several scales, "image" is image + N * index of the scale.
        scores: (P,) their scores.

    Raises:
        ValueError: for maps that are no such maps, or scales that differ in more than their size.
    """
    maps = [scores] if isinstance(scores, Tensor) else scores
    check_threshold(maps, threshold)
    found, values = zip(*(_peaks_of_scale(scale, threshold) for scale in maps), strict=True)
    for index, peaks in enumerate(found):
        peaks[:, 0] += len(maps[0]) * index
    return torch.cat(found), torch.cat(values)


def _peaks_of_scale(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    scores = torch.where(torch.isfinite(scores), scores, -math.inf)
    padded = torch.nn.functional.pad(scores, (1, 1, 1, 1), value=-math.inf)
    is_peak = scores > threshold
    for neighbour in (padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]):
        is_peak &= scores >= neighbour
    peaks = is_peak.nonzero()
    values = scores[is_peak]
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(peaks[order, 0], stable=True)]
    return peaks[order].contiguous(), values[order]


@torch.no_grad()
def gather_displacements(peaks: Tensor, group_offsets: Sequence[Tensor]) -> Tensor:
    """The group offsets at the peaks, towards the other keypoints.

    Args:
        peaks: (P,4) int64, columns image + N * index of the scale, keypoint, y, x.
        group_offsets: (N,40,H,W) of each scale.

    Returns:
        (P,4,2): for a peak of keypoint k the x, y of g(k -> l), l ascending without k; not numbers for a peak outside
        the maps.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
    """
    check_gathering(peaks, group_offsets)
    towards = [[2 * EDGE_INDEX[k, l] for l in range(NUM_KEYPOINTS) if l != k] for k in range(NUM_KEYPOINTS)]
    first = torch.tensor(towards, device=peaks.device)  # [5,4] channels of x
    n = len(group_offsets[0])
    displacements = group_offsets[0].new_full((len(peaks), NUM_KEYPOINTS - 1, 2), math.nan)
    for index, offsets in enumerate(group_offsets):
        limit = torch.tensor([n, NUM_KEYPOINTS, *offsets.shape[2:]], device=peaks.device)
        own = peaks - torch.tensor([n * index, 0, 0, 0], device=peaks.device)
        here = ((own >= 0) & (own < limit)).all(1)
        image, k, y, x = own[here].unbind(1)
        channel = first[k][..., None] + torch.arange(2, device=peaks.device)  # [P,4,2]
        displacements[here] = offsets[image[:, None, None], channel, y[:, None, None], x[:, None, None]]
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
    """`group_peaks` with the displacements that the maps have at the peaks.

    Args:
        peaks: (P,4) int64, columns image, keypoint, y, x, in the order of `find_peaks`.
        scores: (P,) positive scores.
        group_offsets: (N,40,H,W), in pixels.
        match_radius, reject_radius, hops: see `group_peaks`.

    Returns:
        graphs: (G,5,3) x, y, score of each keypoint, score 0 = missing; in the order in which they were opened.
        image: (G,) int64.

    Raises:
        ValueError: for shapes, types, positions outside the maps or options that do not fit.
    """
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
    """Link peaks into keypoint graphs, greedily by falling score (paper, section 2.1, step 2).

    For each image: the best remaining peak leaves the queue; unless it lies within `reject_radius` of a present
    keypoint of its type in an existing graph, it opens a graph. For each other type l ascending, the peak of type l in
    the queue that is nearest to start + g(start -> l), within `match_radius`, leaves the queue and joins (ties: higher
    score). With ``hops=2`` a type that is still missing is looked for from the joined keypoints too, best score first.

    Args:
        peaks: (P,4) int64, columns image, keypoint, y, x, in the order of `find_peaks`. The image is any number that
            tells apart what is grouped apart, such as image + N * index of the scale.
        scores: (P,) positive scores.
        displacements: (P,4,2) as from `gather_displacements`: for a peak of keypoint k the x, y of the group offset
            there towards each other keypoint l, l ascending without k, in pixels. One that is not finite finds nobody.
        match_radius: pixels, r + 1 in the paper's code.
        reject_radius: pixels, 2r.
        hops: 1 or 2.

    Returns:
        graphs: (G,5,3) x, y, score of each keypoint, score 0 = missing; by image, in the order in which they were
            opened.
        image: (G,) int64, ascending.

    Raises:
        ValueError: for shapes, types, positions that cannot be (negative, of 2^31 and more, no keypoint), or options
            that do not fit.
    """
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
    at, by = torch.stack((x, y), dim=1).double(), displacements.double().cpu()
    score = scores.to(dtype).cpu()
    graphs, graph_image = [], []
    for i in image.unique().tolist():
        of = image == i
        own = _group_one_image(keypoint[of], at[of], score[of], by[of], match_radius, reject_radius, hops)
        graphs += own
        graph_image += [i] * len(own)
    if not graphs:
        return scores.new_zeros((0, NUM_KEYPOINTS, 3), dtype=dtype), peaks.new_zeros((0,))
    return torch.stack(graphs).to(peaks.device), torch.tensor(graph_image, device=peaks.device)


def _group_one_image(
    keypoint: Tensor, at: Tensor, score: Tensor, by: Tensor, match_radius: float, reject_radius: float, hops: int
) -> list[Tensor]:
    """Graphs [5,3] of P peaks by falling score: type (P,), position (P,2), score (P,), displacements (P,4,2)."""
    members = [(keypoint == k).nonzero()[:, 0] for k in range(NUM_KEYPOINTS)]  # the peaks of each type
    place = torch.zeros(len(at), dtype=torch.long)  # of a peak among those of its type
    for m in members:
        place[m] = torch.arange(len(m))
    queued = [torch.ones(len(m), dtype=torch.bool) for m in members]
    rejected = [torch.zeros(len(m), dtype=torch.bool) for m in members]

    def squared_distance(k: int, point: Tensor) -> Tensor:
        return (at[members[k]] - point).square().sum(1)

    def join(graph: Tensor, p: int) -> None:
        k = int(keypoint[p])
        queued[k][place[p]] = False
        rejected[k] |= squared_distance(k, at[p]) <= reject_radius**2
        graph[k, :2], graph[k, 2] = at[p], score[p]

    def partner(source: int, l: int) -> int | None:
        other = l if l < keypoint[source] else l - 1  # its place among those other than the source's own type
        squared = squared_distance(l, at[source] + by[source, other])
        squared = torch.where(queued[l] & (squared <= match_radius**2), squared, math.inf)
        if not len(squared) or squared.min() == math.inf:
            return None
        return int(members[l][squared.argmin()])

    graphs = []
    for start, k in enumerate(keypoint.tolist()):
        if not queued[k][place[start]]:
            continue
        queued[k][place[start]] = False
        if rejected[k][place[start]]:
            continue
        graph = torch.zeros(NUM_KEYPOINTS, 3, dtype=score.dtype)
        join(graph, start)
        joined, missing = [], []
        for l in range(NUM_KEYPOINTS):
            if l == k:
                continue
            found = partner(start, l)
            if found is None:
                missing.append(l)
            else:
                join(graph, found)
                joined.append(found)
        if hops == 2:
            joined.sort(key=lambda p: -float(score[p]))
            for l in missing:
                found = next((f for f in (partner(p, l) for p in joined) if f is not None), None)
                if found is not None:
                    join(graph, found)
        graphs.append(graph)
    return graphs


@torch.no_grad()
def graphs_to_boxes(graphs: Tensor, corner_and_centre: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Retrieve the boxes of keypoint graphs (paper, section 2.1, step 3, and figure 1d).

    A side of the box is the outermost of its present corners; a side without corners is the opposite side mirrored
    through the centre. Any three keypoints, or two corners of one diagonal, give a box.

    Args:
        graphs: (G,5,3) x, y, score (0 = missing).
        corner_and_centre: let one corner with the centre give a box too.

    Returns:
        boxes: (R,4) x1, y1, x2, y2: pixel indices of the corners, in the frame of the graphs.
        scores: (R,) mean score of the present keypoints.
        graph: (R,) int64, the graph that each box comes from, ascending.
    """
    check_graphs(graphs)
    x, y, score = graphs.unbind(2)
    present = score > 0

    def side(value: Tensor, corners: tuple[int, int], outer: float) -> tuple[Tensor, Tensor]:
        """Outermost present corner of a side (outer: the sign of outwards), and whether there is one."""
        has = present[:, corners]
        value = torch.where(has, outer * value[:, corners], -math.inf).amax(1)
        return outer * value, has.any(1)

    def pair(value: Tensor, low: tuple[int, int], high: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        (first, has_first), (last, has_last) = side(value, low, -1.0), side(value, high, 1.0)
        mirror = present[:, CENTRE]
        return (
            torch.where(has_first, first, 2 * value[:, CENTRE] - last),
            torch.where(has_last, last, 2 * value[:, CENTRE] - first),
            has_first & has_last | mirror & (has_first | has_last),
        )

    x1, x2, has_x = pair(x, LEFT, RIGHT)
    y1, y2, has_y = pair(y, TOP, BOTTOM)
    enough = present[:, :CENTRE].sum(1) >= (1 if corner_and_centre else 2)
    graph = (has_x & has_y & enough).nonzero()[:, 0]
    boxes = torch.stack((x1, y1, x2, y2), dim=1)[graph]
    total = torch.where(present, score, 0).sum(1)
    return boxes.contiguous(), (total / present.sum(1).clamp(min=1))[graph], graph.contiguous()


def box_keypoints(boxes: Tensor) -> Tensor:
    """Keypoints of boxes: (M,4) xyxy continuous -> (M,5,2) x, y pixel indices, in the order of `graph.KEYPOINTS`."""
    x1, y1, x2, y2 = boxes[:, 0], boxes[:, 1], boxes[:, 2] - 1, boxes[:, 3] - 1
    x = torch.stack((x1, x2, x1, x2, (x1 + x2) / 2), dim=1)
    y = torch.stack((y1, y1, y2, y2, (y1 + y2) / 2), dim=1)
    return torch.stack((x, y), dim=2)


@torch.no_grad()
def render_targets(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    min_side: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training targets of one scale (paper, equations 1 and 3); `modeling.keypoint_targets` says what they are.

    Args:
        boxes: (M,4) float32, xyxy continuous, input pixels.
        image: (M,) int64, the image of each box.
        images: N, their number.
        height, width: of the maps.
        stride: of the scale.
        radius: of the discs, pixels of the scale.
        min_side: boxes are targets where both sides, last minus first pixel, exceed it; pixels of the scale.

    Returns:
        heatmap (N,5,height,width), single offset (N,10,height,width), group offset (N,40,height,width), float32.
    """
    n, h, w, device = images, height, width, boxes.device
    heatmap = torch.zeros(n, NUM_KEYPOINTS, h, w, device=device)
    single = torch.zeros(n, SINGLE_OFFSET_CHANNELS, h, w, device=device)
    group = torch.zeros(n, GROUP_OFFSET_CHANNELS, h, w, device=device)

    large = ((boxes[:, 2:] - boxes[:, :2] - 1) / stride > min_side).all(1)
    image = image[large]
    keypoints = (box_keypoints(boxes[large]) + 0.5) / stride - 0.5  # [M,5,2]
    if not len(keypoints):
        return heatmap, single, group

    # Every pixel of every disc: a square window around each keypoint, cut to the disc and the map.
    reach = math.ceil(radius)
    window = torch.arange(-reach, reach + 2, device=device)
    corner = keypoints.floor().long()
    x = corner[..., 0, None, None] + window
    y = corner[..., 1, None, None] + window[:, None]
    x, y = torch.broadcast_tensors(x, y)  # [M,5,S,S]
    squared = (x - keypoints[..., 0, None, None]) ** 2 + (y - keypoints[..., 1, None, None]) ** 2
    inside = (squared <= radius**2) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    box, k, _, _ = inside.nonzero().unbind(1)
    x, y, squared = x[inside], y[inside], squared[inside]
    pixel = ((image[box] * NUM_KEYPOINTS + k) * h + y) * w + x

    # The nearest keypoint owns the pixel, then the first box: two scatters, so that the order of writes is irrelevant.
    nearest = squared.new_full((heatmap.numel(),), math.inf).scatter_reduce_(0, pixel, squared, "amin")
    box_of = torch.where(squared == nearest[pixel], box, len(keypoints))
    first = box.new_full((heatmap.numel(),), len(keypoints)).scatter_reduce_(0, pixel, box_of, "amin")
    owns = box == first[pixel]
    box, k, x, y = box[owns], k[owns], x[owns], y[owns]

    i, at = image[box], torch.stack((x, y), dim=1)
    heatmap[i, k, y, x] = 1
    offset = keypoints[box, k] - at
    single[i, 2 * k, y, x], single[i, 2 * k + 1, y, x] = offset.unbind(1)
    for e, (source, target) in enumerate(DIRECTED_EDGES):
        of = k == source
        offset = keypoints[box[of], target] - at[of]
        group[i[of], 2 * e, y[of], x[of]], group[i[of], 2 * e + 1, y[of], x[of]] = offset.unbind(1)
    return heatmap, single, group


def convolve_resized(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    """Convolution 3x3 of resized crops, each by itself (paper, figure 1b: up-sampling and the convolution after it).

    Resizing (bilinear, align_corners False) and the convolution are linear: the nine matrices of the kernel may be
    applied before resizing, to the fewer pixels. This does the rest: it resizes the nine products of every crop and
    adds them up, each shifted by its place in the kernel, with zeros around the crop.

    Args:
        products: (P,9,C): the pixels of R crops, row by row, one crop after another, times each matrix of the kernel,
            from its upper left to its lower right.
        before: (R,2) int64 on the CPU, height and width of the crops.
        after: (R,2) int64 on the CPU, height and width to which they are resized.
        places: (R,2) int64 on the CPU, where the resized crops lie in the result: the first pixel, and from there to
            the next row of the crop. They must not overlap.
        pixels: of the result.

    Returns:
        (pixels, C): the resized and convolved crops, without bias; 0 elsewhere.

    Raises:
        ValueError: for shapes, types, sizes or places that do not fit.
    """
    check_crops(products, before, after, places, pixels)
    result = products.new_zeros(pixels, products.shape[2])
    if not len(before):
        return result
    channels, device = products.shape[2], products.device
    # Down the columns: from the pixels before to lines of the crop's width before and its height after, [L,3,C].
    crop, y, x = crop_pixels(torch.stack((after[:, 0], before[:, 1]), dim=1), device)
    first = (before.prod(1).cumsum(0) - before.prod(1)).to(device)
    height, width = before.to(device).unbind(1)
    rows = products.view(-1, 3, 3, channels)
    lines = products.new_zeros(len(crop), 3, channels)
    for tap in range(3):
        for source, weight in _resized_sources(y + tap - 1, height[crop], after[:, 0].to(device)[crop]):
            lines = lines + weight.to(lines)[:, None, None] * rows[first[crop] + source * width[crop] + x, tap]
    # Along the lines.
    lengths = after[:, 0] * before[:, 1]
    first = (lengths.cumsum(0) - lengths).to(device)
    crop, y, x = crop_pixels(after, device)
    resized = products.new_zeros(len(crop), channels)
    for tap in range(3):
        for source, weight in _resized_sources(x + tap - 1, width[crop], after[:, 1].to(device)[crop]):
            resized = resized + weight.to(resized)[:, None] * lines[first[crop] + y * width[crop] + source, tap]
    first, stride = places.to(device).unbind(1)
    return result.index_copy(0, first[crop] + y * stride[crop] + x, resized)


def crop_pixels(sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of crops, row by row, one crop after another.

    Args:
        sizes: (R,2) int64 on the CPU, height and width.
        device: of the results.

    Returns:
        Crop, y and x of each pixel, (P,) int64.
    """
    areas = sizes.prod(1)
    first = (areas.cumsum(0) - areas).to(device)
    crop = torch.repeat_interleave(torch.arange(len(sizes), device=device), areas.to(device), output_size=areas.sum())
    place = torch.arange(len(crop), device=device) - first[crop]
    width = sizes[:, 1].to(device)[crop]
    return crop, place // width, place % width


def _resized_sources(place: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels (P,), and their weights, that bilinear resizing takes for a place; weight 0 outside the crop."""
    last = before - 1
    source = torch.minimum(((place + 0.5) * (before.double() / after) - 0.5).clamp(min=0), last)
    low = source.floor()
    inside = (place >= 0) & (place < after)
    high_weight = source - low
    low = low.long()
    return [(low, (1 - high_weight) * inside), (torch.minimum(low + 1, last), high_weight * inside)]
