"""From masks to label maps, and back to cells."""

import numpy as np
import torch

from kg_detectron.modeling.label_maps import cells_of_labels, label_maps


def test_of_overlapping_masks_the_first_one_wins():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, :2, :2], masks[1, 1:, 1:3] = True, True
    labels = label_maps([masks, torch.zeros(0, 4, 4, dtype=torch.bool)], (4, 6))
    assert labels[0].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0], [0, 2, 2, 0, 0, 0], [0] * 6]
    assert not labels[1].any()


def test_cells_come_by_score_and_labels_may_be_missing():
    labels = np.array([[1, 1, 0], [0, 4, 4], [3, 0, 0]])
    cells = cells_of_labels(labels, torch.tensor([0.2, 0.9, 0.5, 0.5]))
    assert torch.equal(cells.scores, torch.tensor([0.5, 0.5, 0.2]))
    assert cells.boxes.tolist() == [[0, 2, 1, 3], [1, 1, 3, 2], [0, 0, 2, 1]]
    assert [mask.sum() for mask in cells.masks] == [1, 2, 2]
