"""The keypoint graph: five keypoints of a cell's box, and the directed edges between them (paper, section 2.1)."""

# Keypoint k of the heatmap channels: four corners and the centre.
KEYPOINTS = ("tl", "tr", "bl", "br", "centre")
NUM_KEYPOINTS = len(KEYPOINTS)
CENTRE = KEYPOINTS.index("centre")

# Directed edge e (k -> l) of the group offset channels 2e (x) and 2e + 1 (y).
EDGES = tuple((k, l) for k in range(NUM_KEYPOINTS) for l in range(k + 1, NUM_KEYPOINTS))
DIRECTED_EDGES = EDGES + tuple((l, k) for k, l in EDGES)
EDGE_INDEX = {edge: index for index, edge in enumerate(DIRECTED_EDGES)}

# Channels of the three maps at every scale.
HEATMAP_CHANNELS = NUM_KEYPOINTS
SINGLE_OFFSET_CHANNELS = 2 * NUM_KEYPOINTS
GROUP_OFFSET_CHANNELS = 2 * len(DIRECTED_EDGES)

# Keypoints that lie on each side of the box: they give its x1, y1, x2 and y2.
LEFT, TOP, RIGHT, BOTTOM = (0, 2), (0, 1), (1, 3), (2, 3)
