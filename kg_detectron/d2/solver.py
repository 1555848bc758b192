"""The schedule of the learning rate."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Detectron2's schedule of ``cfg.SOLVER``, as if the training were one iteration longer.

    Detectron2 asks for a learning rate after the last iteration too, where WarmupStepWithFixedGammaLR, the published
    decay per epoch, has none: the training would end in an IndexError before its last checkpoint.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER += 1
    return build_detectron2_lr_scheduler(cfg, optimizer)
