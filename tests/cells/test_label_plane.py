"""Label images that are drawn by window: the same pixels as the whole image, at every step, and little memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kg_detectron.cells import MaskCrops, label_plane
from kg_detectron.cells.label_plane import LabelPlane, label_image_of


def random_masks(seed: int, size: tuple[int, int], count: int) -> MaskCrops:
    """Cells of any size and place, some outside of all windows but their own, some without pixels."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, size[::-1], (count, 2))
    ends = np.minimum(corners + rng.integers(1, 60, (count, 2)), size[::-1])
    crops = [
        torch.from_numpy(rng.random(tuple((end - corner)[::-1])) < 0.6)
        for corner, end in zip(corners, ends, strict=True)
    ]
    return MaskCrops(crops, torch.from_numpy(np.hstack((corners, ends))), size)


@given(seed=st.integers(0, 2**31), count=st.sampled_from([0, 1, 40]), step=st.integers(1, 70), data=st.data())
def test_windows_are_those_of_the_whole_image(seed: int, count: int, step: int, data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 700), st.integers(1, 700)))
    masks = random_masks(seed, size, count)
    plane, whole = LabelPlane(masks), masks.label_image()
    assert (plane.shape, plane.dtype, plane.size, plane.nbytes) == (whole.shape, whole.dtype, whole.size, whole.nbytes)
    window = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, side), st.integers(0, side))))) for side in size)
    np.testing.assert_array_equal(plane[window], whole[window])
    stepped = tuple(slice(part.start, part.stop, step) for part in window)
    np.testing.assert_array_equal(plane[stepped], whole[stepped])
    np.testing.assert_array_equal(plane[window[0]], whole[window[0]])
    np.testing.assert_array_equal(np.asarray(plane, np.int64), whole)


def test_blocks_and_what_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_plane, "_BLOCK", 64)
    masks = random_masks(0, (130, 100), 30)
    plane = LabelPlane(masks)
    blocks = list(plane.blocks())
    assert len(blocks) == 6 and sum(map(np.count_nonzero, blocks)) == np.count_nonzero(masks.label_image())
    assert plane.max(initial=0) == 30 and LabelPlane(masks[:0]).max(initial=7) == 7
    for wrong in (3, (slice(None), 2), (slice(None, None, -1), slice(None)), (slice(None),) * 3):
        with pytest.raises(TypeError, match="expected slices"):
            plane[wrong]


def test_an_image_of_any_size_takes_no_memory() -> None:
    masks = MaskCrops(
        [torch.ones(5, 4, dtype=torch.bool)], torch.tensor([[70_000, 90_000, 70_004, 90_005]]), (10**5,) * 2
    )
    plane = label_image_of(masks)
    assert isinstance(plane, LabelPlane) and plane.nbytes == 2 * 10**10
    assert plane[89_998:90_010, 69_990:70_010].sum() == 20 and not plane[:500, :500].any()
    assert isinstance(label_image_of(MaskCrops([], torch.zeros(0, 4, dtype=torch.long), (50, 60))), np.ndarray)
