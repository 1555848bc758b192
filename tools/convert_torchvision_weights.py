"""Rename torchvision's ResNet weights to Detectron2's names.

    python tools/convert_torchvision_weights.py ResNet50_Weights.IMAGENET1K_V1 R-50.pth
    python tools/convert_torchvision_weights.py my_resnet50.pth R-50.pth

Use the file as MODEL.WEIGHTS of a Mask R-CNN with a C4 or an FPN backbone and MODEL.RESNETS.STRIDE_IN_1X1 False, as in
configs/parts/method/mask_rcnn_c4.yaml. It is a plain dictionary of tensors that loads with weights_only=True.
"""

import argparse
import re
from pathlib import Path

import torch
import torchvision

from kg_detectron.io.atomic import replacing
from kg_detectron.io.safe_load import read_checkpoint

# Depth -> blocks of layer1..layer4. From 50 on a block has three convolutions, below it has two.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet_depth(state_dict: dict[str, torch.Tensor]) -> int:
    """Depth of the torchvision ResNet (18, 34, 50, 101 or 152) that ``state_dict`` belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    blocks = [{match[1] for key in state_dict if (match := re.match(rf"layer{n}\.(\d+)\.", key))} for n in (1, 2, 3, 4)]
    counts = tuple(len(indices) for indices in blocks)
    bottleneck = "layer1.0.conv3.weight" in state_dict
    for depth, expected in _BLOCKS.items():
        if counts == expected and bottleneck == (depth >= 50) and "conv1.weight" in state_dict:
            return depth
    raise ValueError(f"not the weights of a torchvision ResNet: {counts} blocks in layer1..layer4")


def convert(state_dict: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """torchvision's ``state_dict`` of a ResNet of ``depth`` -> the same tensors under the names of Detectron2's ResNet.

    ``conv1`` and ``bn1`` become ``stem.conv1`` and ``stem.conv1.norm``; ``layer1.0.bn2`` becomes ``res2.0.conv2.norm``,
    ``downsample`` becomes ``shortcut``. The classifier and the counters of batches are left out.

    Raises:
        ValueError: ``state_dict`` belongs to another depth, or to no ResNet.
    """
    found = resnet_depth(state_dict)
    if found != depth:
        raise ValueError(f"depth {depth} was expected, but these are the weights of a ResNet-{found}")
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith("fc.") or key.endswith(".num_batches_tracked"):
            continue
        key = re.sub(r"^(?=conv1|bn1)", "stem.", key)
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
        renamed[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    return renamed


def load_torchvision(weights: str) -> dict[str, torch.Tensor]:
    """State dict named by a member of torchvision's weight enums, such as ResNet50_Weights.IMAGENET1K_V1, or by a file.

    Raises:
        ValueError: ``weights`` is neither, or a file that holds more than weights.
    """
    if Path(weights).is_file():
        state_dict = read_checkpoint(weights)
        if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
            raise ValueError(f"{weights}: expected a dictionary of weights")
        return state_dict
    try:
        return torchvision.models.get_weight(weights).get_state_dict(progress=True, check_hash=True)
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{weights!r} is neither a file nor a member of torchvision's weight enums") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="member of torchvision's weight enums, or a .pth file of a torchvision ResNet")
    parser.add_argument("output", type=Path, help=".pth file to write")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".pth":
        parser.error(f"output must end in .pth, got {options.output}")
    try:
        state_dict = load_torchvision(options.weights)
        depth = resnet_depth(state_dict)
    except ValueError as error:
        parser.error(str(error))
    # Detectron2 matches these names as suffixes of the model's own (backbone., backbone.bottom_up., roi_heads.).
    checkpoint = {"model": convert(state_dict, depth), "__author__": "torchvision", "matching_heuristics": True}
    try:
        with replacing(options.output) as unfinished:
            torch.save(checkpoint, unfinished)
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a missing folder
        parser.error(f"{options.output} cannot be written: {error}")
    print(f"{options.output}: ResNet-{depth}, {len(checkpoint['model'])} tensors")


if __name__ == "__main__":
    main()
