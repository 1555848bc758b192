"""The confidence head of a keypoint graph, fitted where Detectron2 has trained the rest."""

import copy
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed, nn

from kg_detectron.d2.loaders import training_records
from kg_detectron.d2.meta_architecture import CellInstanceSegmentation
from kg_detectron.inference.model_file import WEIGHTS
from kg_detectron.io.atomic import replacing
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.modeling import Preprocessing
from kg_detectron.modeling.confidence import ConfidenceHead
from kg_detectron.training.checkpoint import save_checkpoint
from kg_detectron.training.confidence import fit_confidence
from kg_detectron.training.dataset import LabelledImage, image_of_record

logger = logging.getLogger(__name__)

# What the fit took, in the folder of the run.
CONFIDENCE_FILE = "confidence.json"


class _Images(Sequence[LabelledImage]):
    """The images of records, read when they are asked for."""

    def __init__(self, records: Sequence[dict[str, Any]], preprocessing: Preprocessing) -> None:
        self.records, self.preprocessing = records, preprocessing

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> LabelledImage: ...
    @overload
    def __getitem__(self, index: slice) -> "_Images": ...
    def __getitem__(self, index: int | slice) -> "LabelledImage | _Images":
        if isinstance(index, slice):
            return _Images(self.records[index], self.preprocessing)
        return image_of_record(self.records[index], self.preprocessing)


def confidence_head(model: nn.Module) -> ConfidenceHead | None:
    """The confidence head of a model, itself or in `DistributedDataParallel`; None of one without."""
    network = getattr(getattr(model, "module", model), "network", None)
    return getattr(getattr(network, "segmentation", None), "confidence_head", None)


class FitConfidence(HookBase):
    """At the end of a training fit the confidence head to the images that it saw, see `fit_confidence`.

    The best and the last model of the run get a head of their own each, and their files are written again. Register it
    after the hooks that write these, and before `EvalHook`, which evaluates at the end too. One process fits for all.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def after_train(self) -> None:
        model: Any = getattr(self.trainer.model, "module", self.trainer.model)
        head = confidence_head(model)
        if head is None or self.trainer.iter + 1 < self.trainer.max_iter:
            return
        if comm.is_main_process():
            self._fit(model, head)
        if comm.get_world_size() > 1:
            for value in head.state_dict().values():
                distributed.broadcast(value, 0)

    def _fit(self, model: CellInstanceSegmentation, head: ConfidenceHead) -> None:
        started, folder = time.perf_counter(), Path(self.cfg.OUTPUT_DIR)
        images = _Images(training_records(self.cfg), model.network.preprocessing)
        heads: dict[int, dict[str, Any]] = {}  # by the iteration that a file is of; the best may be the last one
        boxes = 0
        # The last model comes last, and stays in memory.
        for file in (folder / name for name in (WEIGHTS if self.cfg.DATASETS.VALIDATION else WEIGHTS[-1:])):
            state = read_checkpoint(file)
            model.load_state_dict(state["model"])
            iteration = state["iteration"]
            if iteration in heads:
                head.load_state_dict(heads[iteration])
            else:
                boxes = fit_confidence(model.network, images, self.cfg.SEED)
                heads[iteration] = copy.deepcopy(head.state_dict())
            save_checkpoint(file, state | {"model": model.state_dict()})
        minutes = (time.perf_counter() - started) / 60
        logger.info("the confidence head was fitted to %d boxes in %.1f minutes", boxes, minutes)
        with replacing(folder / CONFIDENCE_FILE) as unfinished:
            unfinished.write_text(json.dumps({"boxes": boxes, "minutes": minutes}) + "\n")
