"""The trainer: Detectron2's, with the data, optimiser, evaluation, checkpoints and hooks of this project.

Several processes together compute the losses of one process with the whole batch, on CPUs too.
"""

import contextlib
import os
import weakref
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.d2.confidence import FitConfidence, confidence_head
from kg_detectron.d2.evaluators import build_evaluators
from kg_detectron.d2.hooks import (
    EarlyStopping,
    FiniteLosses,
    MeanStatistics,
    Seeding,
    StopOnSignal,
    StopTraining,
    ValidationLoss,
)
from kg_detectron.d2.loaders import build_test_loader, build_train_loader, build_validation_loader
from kg_detectron.d2.meta_architecture import Description
from kg_detectron.d2.solver import build_lr_scheduler
from kg_detectron.d2.writers import build_writers
from kg_detectron.inference.model_file import DESCRIPTION_KEY
from kg_detectron.modeling.backbone import may_be_pretrained
from kg_detectron.modeling.cpu_layers import use_cpu_layers
from kg_detectron.modeling.processes import shared_losses

# Checkpoints that stay beside model_best.pth and model_final.pth.
CHECKPOINTS_TO_KEEP = 2


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the data, optimiser, evaluation, checkpoints and hooks of this project.

    Raises:
        ValueError: settings that the training cannot have, such as SyncBN in several processes on CPUs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)  # that of DefaultTrainer takes GPUs for granted, and makes a checkpointer of its own
        processes = comm.get_world_size()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, processes)
        model = self.build_model(cfg)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        if on_cpu and processes > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise ValueError(
                "MODEL.CELLS.NORM: SyncBN in several processes works on GPUs only, so PyTorch; on CPUs use GN or "
                "FrozenBN, or BN, which normalises the images of each process by themselves"
            )
        optimizer, loader = self.build_optimizer(cfg, model), self.build_train_loader(cfg)
        devices = None if on_cpu or processes == 1 else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        description = Description.of(model)
        if description is not None:
            self.checkpointer.add_checkpointable(DESCRIPTION_KEY, description)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        use_cpu_layers(model)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.basename(dataset_name).removesuffix(".json")  # of a dataset that is named by its file
        return build_evaluators(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", folder))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        solver = cfg.SOLVER
        if solver.OPTIMIZER not in ("SGD", "ADAM"):
            raise ValueError(f"SOLVER.OPTIMIZER: expected SGD or ADAM, got {solver.OPTIMIZER!r}")
        factor = cfg.MODEL.CELLS.BACKBONE_LR_FACTOR
        parameters = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda name: factor if may_be_pretrained(name) else 1.0,
        )
        if solver.OPTIMIZER == "ADAM":
            return maybe_add_gradient_clipping(cfg, torch.optim.Adam)(parameters, solver.BASE_LR)
        sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        return sgd(parameters, solver.BASE_LR, solver.MOMENTUM, nesterov=solver.NESTEROV)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    def build_hooks(self) -> list[HookBase]:
        cfg = self.cfg
        default = [hook for hook in super().build_hooks() if hook is not None]
        for hook in default:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = CHECKPOINTS_TO_KEEP
        validation = []
        if cfg.DATASETS.VALIDATION:
            stop = cfg.SOLVER.EARLY_STOPPING
            validation = [
                ValidationLoss(cfg.TEST.EVAL_PERIOD, lambda: build_validation_loader(cfg)),
                EarlyStopping(self.checkpointer, patience=stop.PATIENCE, min_delta=stop.MIN_DELTA),
            ]
        kinds = [type(hook) for hook in default]
        stepped, evaluation = kinds.index(hooks.LRScheduler) + 1, kinds.index(hooks.EvalHook)
        return [
            Seeding(self.data_loader.sampler, cfg.SOLVER.IMS_PER_BATCH),
            FiniteLosses(),
            MeanStatistics(),
            *default[:stepped],
            *validation,
            *default[stepped:evaluation],
            StopOnSignal(self.checkpointer),
            *([] if confidence_head(self.model) is None else [FitConfidence(cfg)]),
            *default[evaluation:],
        ]

    def build_writers(self) -> list[EventWriter]:
        return []  # Detectron2 asks before it is known where a resumed run begins; `train` adds them

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of the run, where it is resumed and there is one, or ``MODEL.WEIGHTS``.

        Raises:
            FileNotFoundError, ValueError: see `WholeCheckpointer.load`; and processes that find different checkpoints.
        """
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise ValueError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: expected one folder that all machines share, but the processes "
                f"would go on at the iterations {starts}"
            )

    def run_step(self) -> None:
        with shared_losses():
            super().run_step()

    def train(self) -> None:
        if comm.is_main_process():
            if not self.start_iter:
                self.checkpointer.forget_last_checkpoint()
            writers = build_writers(self.cfg.OUTPUT_DIR, self.start_iter, self.max_iter)
            self.register_hooks([hooks.PeriodicWriter(writers, period=20)])
        with contextlib.suppress(StopTraining):
            super().train()
