"""The segmentation branch as the paper defines it: one crop at a time. The oracle of its tests and benchmark."""

from torch import Tensor
from torch.nn.functional import interpolate

from kg_detectron.modeling import SegmentationBranch


def one_by_one(branch: SegmentationBranch, features: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
    """Mask logits (h,w) of all boxes, image after image."""
    return [segment_one(branch, features, box, image) for image, own in enumerate(boxes) for box in own]


def segment_one(branch: SegmentationBranch, features: list[Tensor], box: Tensor, image: int) -> Tensor:
    crops = []
    for level, feature in enumerate(features):
        x1, y1, x2, y2 = (int(v) for v in (box / 2**level).round())
        if level == 0:
            x1, y1 = min(x1, int(box[2].ceil()) - 1), min(y1, int(box[3].ceil()) - 1)
            x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        x2, y2 = min(x2, feature.shape[3]), min(y2, feature.shape[2])
        if min(x2 - x1, y2 - y1) < 2:
            if level == 0:
                crops.append(feature[image : image + 1, :, y1:y2, x1:x2])
            break
        crops.append(feature[image : image + 1, :, y1:y2, x1:x2])
    result = crops[-1]
    if len(crops) < len(features) or len(features) == 1:
        result = branch.starts[len(crops) - 1](result)
    for level in reversed(range(len(crops) - 1)):
        deep = interpolate(result, crops[level].shape[2:], mode="bilinear", align_corners=False)
        result = branch.steps[level](deep, crops[level])
    return branch.predict(branch.hidden(result))[0, 0]
