"""The keypoint graphs of a segmentation as napari's layers: keypoints as points, links as vectors."""

from typing import Any

import numpy as np

from kg_detectron.graph import KEYPOINTS
from kg_detectron.inference.explanation import BOX
from kg_detectron.napari.segmentation import Segmentation

LayerData = tuple[Any, dict[str, Any], str]

# Those of the picture of `kg-detectron explain`.
_COLOURS = dict(zip(KEYPOINTS, ("#d55e00", "#0072b2", "#cc79a7", "#009e73", "#f0e442"), strict=True))


def graph_layers(segmentation: Segmentation, threshold: float) -> list[LayerData]:
    """Layers of the keypoints, and of the links from each keypoint that opened a group to the others of its graph.

    Args:
        segmentation: with explanations; others give empty layers.
        threshold: graphs whose box has a lower score are left out.

    Returns:
        ``(data, options, kind)`` of a points and a vectors layer: points (P, D), vectors (V, 2, D) as start and
        direction, in pixels of the layer: index i is the centre of pixel i.
    """
    points: list[tuple[float, ...]] = []
    vectors: list[list[tuple[float, ...]]] = []
    names: list[str] = []
    scores: list[float] = []
    for plane in segmentation.planes:
        if plane.explanation is None or plane.graph_scores is None:
            continue
        for group in plane.explanation.groups:
            if group.fate != BOX or group.number is None or group.number >= len(plane.graph_scores):
                continue
            if plane.graph_scores[group.number] < threshold:
                continue
            # The centre of pixel i is i + 0.5 there.
            places = [(*plane.place, y - 0.5, x - 0.5) for x, y, _ in group.keypoints.tolist()]
            start = places[group.opener]
            for k, (name, place) in enumerate(zip(KEYPOINTS, places, strict=True)):
                if group.keypoints[k, 2] > 0:
                    points.append(place)
                    names.append(name)
                    scores.append(float(group.keypoints[k, 2]))
                    if k != group.opener:
                        vectors.append([start, tuple(b - a for a, b in zip(start, place, strict=True))])
    dimensions = len(segmentation.shape)
    names_column = np.array(names, dtype=object)
    return [
        (
            np.array(points).reshape(-1, dimensions),
            {
                "name": "keypoints",
                "features": {"keypoint": names_column, "score": np.array(scores)},
                "face_color": [_COLOURS[name] for name in names] or "white",
                "border_color": "black",
                "size": 3,
            },
            "points",
        ),
        (
            np.array(vectors).reshape(-1, 2, dimensions),
            {"name": "links", "edge_color": "white", "edge_width": 0.5, "vector_style": "line"},
            "vectors",
        ),
    ]
