"""Configuration keys of kg_detectron, added to Detectron2's defaults."""

from typing import TextIO

import yaml
from detectron2.config import CfgNode as CN


class _LocalFiles(CN):
    """Reads configs without asking the network for them."""

    @classmethod
    def _open_cfg(cls, filename: str) -> TextIO:
        if "://" in filename:
            raise ValueError(f"{filename} was refused: a config is not downloaded, give it as a file")
        return open(filename, encoding="utf-8")


def merge_config(cfg: CN, file: str) -> None:
    """Merge a config file and its ``_BASE_`` into ``cfg`` (in place), read as data only.

    Raises:
        OSError: a file is missing.
        KeyError: a key that does not exist.
        ValueError: not YAML, more than data, or a ``_BASE_`` to be downloaded.
    """
    try:
        _LocalFiles.load_yaml_with_base(file, allow_unsafe=False)
        cfg.merge_from_file(file, allow_unsafe=False)
    except (yaml.YAMLError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} cannot be used as a config: {error}") from error


def add_kg_config(cfg: CN) -> None:
    """Add every key of kg_detectron, with its default, to a Detectron2 config (in place).

    The defaults are the paper's. Keys under ``INPUT``, ``SOLVER`` and ``TEST`` serve Mask R-CNN too.
    """
    kg = cfg.MODEL.KEYPOINT_GRAPH = CN()

    # Backbone: depth of the residual network, 18, 34 or 50.
    kg.DEPTH = 50
    # Norm layer of the backbone: BN, FrozenBN, SyncBN or GN.
    kg.NORM = "BN"
    # Initial weights of the backbone: a member of torchvision's weight enums for that depth, such as
    # "IMAGENET1K_V1" (downloaded by torchvision), or "" for random ones.
    kg.BACKBONE_WEIGHTS = ""
    # Channels of c0, the two convolutions on the image itself.
    kg.C0_CHANNELS = 64
    # Keypoint branch: "paper", or "lite", ours, of few operations (its norm layer is NORM too).
    kg.BRANCH = "paper"
    # Channels of the decoder maps s1, s2, s3, s4; the segmentation branch has the same.
    kg.WIDTHS = [64, 64, 256, 512]
    # Kernel size of the keypoint heads, in the lite branch of all its depthwise convolutions; pixels of a scale, odd.
    kg.HEAD_KERNEL = 7
    # Scales with keypoint heads, a subset of 1, 2, 3, 4 (strides 1, 2, 4, 8).
    kg.SCALES = [1, 2, 3, 4]

    # Radius r of the keypoint discs, pixels of each scale. Grouping matches within r + 1 and rejects within 2 r.
    kg.RADIUS = 5.0
    # Cells with both sides (last minus first pixel) above this many pixels of the finest scale are targets there; 0
    # asks for 2 r + 1, as at the other scales.
    kg.MIN_SIDE = 0.0
    # Weights of the losses: heatmap, single offset and group offset per scale, and mask.
    kg.HEATMAP_WEIGHT = 1.0
    kg.SINGLE_OFFSET_WEIGHT = 1.0
    kg.GROUP_OFFSET_WEIGHT = 0.25
    kg.MASK_WEIGHT = 1.0
    # Training of the masks: every edge of a ground-truth box is moved at random by up to this fraction of the box's
    # side, as detected boxes are off; at least 0, off, and below 0.5.
    kg.BOX_JITTER = 0.0

    # Standard deviation of the Gaussian on the votes, pixels of each scale.
    kg.SMOOTH_SIGMA = 2.0
    # Smoothed votes above which a local maximum is a peak.
    kg.PEAK_THRESHOLD = 0.004
    # Grouping: 1 looks for partners from the first keypoint only, 2 from the joined ones too.
    kg.HOPS = 1
    # Retrieval: let one corner and the centre give a box too.
    kg.CORNER_AND_CENTRE = False
    # Intersection over union above which the lower-scoring of two boxes is dropped, over all scales.
    kg.NMS_THRESHOLD = 0.5
    # Scores: each is multiplied by exp(-BLUR_WEIGHT * blur), blur being the pixels of doubt across the outline of the
    # mask; per pixel, 0 leaves the paper's mean of the votes.
    kg.BLUR_WEIGHT = 0.0
    # Then by exp(-u^2 / OVERLAP_SIGMA), u being the greatest intersection over union of the box with that of a cell of
    # higher score; 0 is off. With it NMS_THRESHOLD may be higher.
    kg.OVERLAP_SIGMA = 0.0
    # Input pixels by which the crop that is segmented for a cell reaches beyond its box, on every side; the box of the
    # cell is then that of its mask. It asks for training with BOX_JITTER. 0 is off.
    kg.MASK_MARGIN = 0.0
    # Pixels of mask crops that go through the segmentation branch together; bounds its memory, in training too.
    kg.PIXELS_IN_FLIGHT = 2**18
    # Mask probability from which a pixel belongs to the cell.
    kg.MASK_THRESHOLD = 0.5

    # Floating-point type of the convolutions in evaluation: float32, bfloat16 or float16; decoding always runs in
    # float32. For training there is SOLVER.AMP.
    kg.PRECISION = "float32"
    # Compile backbone and keypoint branch with torch.compile: a minute at the first image, and a C++ compiler at hand.
    kg.COMPILED = False

    # Channels-last tensors, in training and evaluation: a fifth faster on CPUs, the same results up to rounding.
    cfg.MODEL.CHANNELS_LAST = False

    # Datasets of the validation loss, which early stopping watches; empty computes none (the figures use TEST).
    cfg.DATASETS.VALIDATION = ()

    # Network input, pixels (height, width): every image is resized to it, in training and in testing.
    cfg.INPUT.SIZE = (512, 512)
    # How grey levels become 0..255, in training, testing and wherever the model goes: "fixed" takes 8-bit images as
    # they are, 16-bit ones / 257 and float ones * 255; "percentile" maps the values of each channel at two PERCENTILES
    # of the whole image to 0 and 255 and clips beyond, for images of any range. PIXEL_MEAN and PIXEL_STD apply after.
    cfg.INPUT.NORMALISATION = "fixed"
    cfg.INPUT.PERCENTILES = (1.0, 99.8)
    # Training augmentations (paper, section 3), each applied with probability 1/2 or 0 where it is off.
    aug = cfg.INPUT.AUGMENTATION = CN()
    # Random expansion: the image on a canvas up to this many times as large; 1 is off.
    aug.EXPAND = 2.0
    # Random crop that keeps cells: smallest side, fraction of the image's; 1 is off.
    aug.CROP = 0.5
    # Random window of the resized image, pixels (height, width), always cut; (0, 0) is off. Training on windows sees
    # cells as large as in testing, for less.
    aug.WINDOW = (0, 0)
    # Horizontal and vertical flip.
    aug.FLIP = True
    # Contrast factor, lowest and highest; (1, 1) is off.
    aug.CONTRAST = (0.5, 1.5)
    # Brightness shift, grey levels of 255, either way; 0 is off.
    aug.BRIGHTNESS = 32.0
    # Random permutation of the colour channels.
    aug.PERMUTE_CHANNELS = True

    # Optimiser: "SGD" (Detectron2's) or "ADAM" (the paper's).
    cfg.SOLVER.OPTIMIZER = "ADAM"
    # Stop when the validation loss has not fallen by MIN_DELTA (a fraction of the best) over PATIENCE evaluations;
    # the evaluations come every TEST.EVAL_PERIOD iterations. PATIENCE 0 never stops.
    stop = cfg.SOLVER.EARLY_STOPPING = CN()
    stop.PATIENCE = 0
    stop.MIN_DELTA = 0.0

    # Intersections over union at which the paper's metrics are computed.
    cfg.TEST.PAPER_IOUS = [0.5, 0.7]
    # Detections an image that the COCO evaluator looks at (its own default, 100, fails crowded images).
    cfg.TEST.COCO_MAX_DETECTIONS = 10000
