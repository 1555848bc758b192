"""The paper's augmentations (section 3), as Detectron2's transforms.

H, W are the sides of an image or of the network input, pixels; N counts cells. Boxes are xyxy in continuous coordinates
(the last pixel + 1). All randomness comes from NumPy's global generator, which `SampleDataset` seeds for every sample.
"""

import functools

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from kg_detectron.io.resize import resize_image, resize_labels


class ExpandTransform(T.PadTransform):
    """Pad an image with one value per channel, and label images with 0."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        height, width = img.shape[:2]
        canvas = np.empty((self.y0 + height + self.y1, self.x0 + width + self.x1, *img.shape[2:]), img.dtype)
        canvas[:] = self.pad_value
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class RandomExpand(T.Augmentation):
    """Put the image at a random place on a canvas up to ``ratio`` times as wide and as high.

    ``fill`` is the grey level of the canvas; None takes each channel's median along the image's border, which is
    background in fluorescence, bright-field and stained images alike. (A fixed value would frame most of them with an
    edge that no real image has.)
    """

    def __init__(self, ratio: float, fill: float | None = None):
        if ratio < 1:
            raise ValueError(f"ratio of the random expansion must be at least 1, got {ratio}")
        self.ratio = ratio
        self.fill = fill

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        ratio = self._rand_range(1, self.ratio)
        spare_y, spare_x = round(height * ratio) - height, round(width * ratio) - width
        top, left = np.random.randint(spare_y + 1), np.random.randint(spare_x + 1)
        fill = self.fill
        if fill is None:
            fill = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
        return ExpandTransform(left, top, spare_x - left, spare_y - top, orig_w=width, orig_h=height, pad_value=fill)


class RandomCellCrop(T.Augmentation):
    """Crop a random window that contains the centre of at least one cell, where the image has any.

    Each side of the window is between ``smallest`` and 1 of the image's, and its aspect, relative to the image's,
    between 1/2 and 2: every image is resized to one size afterwards, so this is the distortion that the crop adds.
    """

    def __init__(self, smallest: float):
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest side of the random crop must be in (0, 1], got {smallest}")
        self.smallest = smallest

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        part_y = self._rand_range(self.smallest, 1)
        part_x = self._rand_range(max(self.smallest, part_y / 2), min(1, part_y * 2))
        window_h, window_w = max(1, round(height * part_y)), max(1, round(width * part_x))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N,2) x, y
        centres = centres[((centres >= 0) & (centres < (width, height))).all(axis=1)]
        centre_x, centre_y = centres[np.random.randint(len(centres))] if len(centres) else (None, None)
        left = _random_start(width, window_w, centre_x)
        top = _random_start(height, window_h, centre_y)
        return T.CropTransform(left, top, window_w, window_h, orig_w=width, orig_h=height)


def _random_start(length: int, window: int, inside: float | None) -> int:
    """First pixel of a random window on an axis; the window contains the coordinate ``inside``, unless that is None."""
    first, last = 0, length - window
    if inside is not None:
        first, last = max(first, int(inside) - window + 1), min(last, int(inside))
    return int(np.random.randint(first, last + 1))


class ExactResizeTransform(T.Transform):
    """Resize h x w to new_h x new_w: a coordinate x becomes x * new_w / w in images, labels and boxes alike.

    By `resize_image` and `resize_labels`, as in prediction. Detectron2's own transform shifts labels of other types
    than uint8 by up to half a pixel.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return resize_image(img, (self.new_h, self.new_w))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return resize_labels(segmentation, (self.new_h, self.new_w))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * (self.new_w / self.w, self.new_h / self.h)

    def inverse(self) -> T.Transform:
        return ExactResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ExactResize(T.Augmentation):
    """Resize to ``size`` (height, width), not keeping the aspect, as the paper does."""

    def __init__(self, size: tuple[int, int]):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive height and width, got {size}")
        self.size = tuple(size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return ExactResizeTransform(*image.shape[:2], *self.size)


class RandomWindow(T.Augmentation):
    """Cut a window of ``size`` (height, width) at a random place, of the whole image where it is smaller.

    Cells at the window's edge are cut; what is left of them are cells too, as at the edge of an image.
    """

    def __init__(self, size: tuple[int, int]):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive height and width, got {size}")
        self.size = tuple(size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        (h, w), (height, width) = image.shape[:2], np.minimum(self.size, image.shape[:2]).tolist()
        return T.CropTransform(np.random.randint(w - width + 1), np.random.randint(h - height + 1), width, height, w, h)


def scale_intensity(image: np.ndarray, gain: float, shift: float) -> np.ndarray:
    """``gain * image + shift``, clipped to 0..255, of an image of floats. The type stays."""
    return np.clip(image * gain + shift, 0, 255).astype(image.dtype)


class RandomContrast(T.Augmentation):
    """Multiply the image by a random factor (about black, as the published code does, not about the mean)."""

    def __init__(self, lowest: float, highest: float):
        if not 0 < lowest <= highest:
            raise ValueError(f"contrast factors must be positive and in rising order, got {lowest}, {highest}")
        self.lowest = lowest
        self.highest = highest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gain = self._rand_range(self.lowest, self.highest)
        return T.ColorTransform(functools.partial(scale_intensity, gain=gain, shift=0.0))


class RandomBrightness(T.Augmentation):
    """Add a random value between -``shift`` and ``shift`` grey levels to the image."""

    def __init__(self, shift: float):
        if shift < 0:
            raise ValueError(f"brightness shift must not be negative, got {shift}")
        self.shift = shift

    def get_transform(self, image: np.ndarray) -> T.Transform:
        shift = self._rand_range(-self.shift, self.shift)
        return T.ColorTransform(functools.partial(scale_intensity, gain=1.0, shift=shift))


class RandomChannelOrder(T.Augmentation):
    """Permute the colour channels at random (the order may come out unchanged)."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        order = np.random.permutation(image.shape[2])
        return T.ColorTransform(functools.partial(np.take, indices=order, axis=2))


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations that ``cfg.INPUT`` asks for (paper, section 3), each with probability 1/2, and the resize.

    In testing the resize alone. Flips and colours come after it, where there are fewer pixels to touch.

    Raises:
        ValueError: names a value out of its range.
    """
    aug = cfg.INPUT.AUGMENTATION
    resize = ExactResize(cfg.INPUT.SIZE)
    if not is_train:
        return [resize]
    steps: list[T.Augmentation] = []
    if aug.EXPAND != 1:
        steps.append(T.RandomApply(RandomExpand(aug.EXPAND)))
    if aug.CROP != 1:
        steps.append(T.RandomApply(RandomCellCrop(aug.CROP)))
    steps.append(resize)
    if tuple(aug.WINDOW) != (0, 0):
        steps.append(RandomWindow(aug.WINDOW))
    if aug.FLIP:
        steps += [T.RandomFlip(horizontal=True), T.RandomFlip(horizontal=False, vertical=True)]
    if tuple(aug.CONTRAST) != (1, 1):
        steps.append(T.RandomApply(RandomContrast(*aug.CONTRAST)))
    if aug.BRIGHTNESS != 0:
        steps.append(T.RandomApply(RandomBrightness(aug.BRIGHTNESS)))
    if aug.PERMUTE_CHANNELS:
        steps.append(T.RandomApply(RandomChannelOrder()))
    return steps
