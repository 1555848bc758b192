"""Checkpoints that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from kg_detectron.d2.model_files import model_file_of
from kg_detectron.inference.model_file import read_model
from kg_detectron.inference.model_names import SAFETENSORS
from kg_detectron.io.atomic import replacing
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.training.checkpoint import save_checkpoint

# Where a file is written before it takes its name. One name for all: what a killed process leaves, the next save takes.
_UNFINISHED = ".unfinished"


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for runs that may be killed, or run out of disk, at any moment.

    A checkpoint, and ``last_checkpoint`` that names the one to resume from, are on the disk whole before they take
    their names; until then the former ones stay.

    Files are read as data only. ``trust_pickle`` lets a file run the code that is in it: the one way to load
    Detectron2's own weights (``.pkl``), those of pycls (``.pyth``) and old checkpoints. Model files of the core
    (``.safetensors``) load completely or not at all.

    Args:
        complete: refuse any file that has not all weights of the model, of which Detectron2 only warns.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, trust_pickle: bool = False, complete: bool = False, **parts: Any
    ) -> None:
        super().__init__(model, save_dir, **parts)
        self.trust_pickle = trust_pickle
        self.complete = complete

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the states of the checkpointables.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that cannot be read as a checkpoint, that would run code, or whose weights do not fit.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: there is no such file of weights")
        return super().load(path, checkpointables)

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name.pth`` with the model, all checkpointables and ``extra``, in the main process.

        Raises:
            FloatingPointError: the weights are not finite; nothing is written.
            OSError: it cannot be written, the disk is full for example; what was there before stays.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        with self._errors_name_the_last_checkpoint(file):
            save_checkpoint(file, {"model": self.model.state_dict(), **states, **extra}, temporary=_UNFINISHED)
        self.tag_last_checkpoint(file.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        file = Path(self.save_dir, "last_checkpoint")
        with self._errors_name_the_last_checkpoint(file), replacing(file, durable=True, temporary=_UNFINISHED) as new:
            new.write_text(last_filename_basename)

    def forget_last_checkpoint(self) -> None:
        """A new run begins in the folder: killed before its first checkpoint, it must not resume the former one."""
        if self.save_to_disk:
            Path(self.save_dir, "last_checkpoint").unlink(missing_ok=True)

    @contextmanager
    def _errors_name_the_last_checkpoint(self, file: Path) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {self._kept()}") from None
        except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of an OSError that it meets
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, f"{file} was not written: {cause.strerror}. {self._kept()}") from error

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from, "" where there is none.

        Raises:
            ValueError: ``last_checkpoint`` names a file elsewhere than beside itself.
        """
        file = super().get_checkpoint_file()
        if file and Path(file).parent != Path(self.save_dir):
            raise ValueError(f"{self.save_dir}/last_checkpoint names {file}, expected a file in its folder")
        return file

    def _kept(self) -> str:
        last = self.get_checkpoint_file()
        return f"The last whole checkpoint is {last}" if last else "There is no earlier checkpoint"

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")) and not self.trust_pickle:
            raise ValueError(
                f"{filename} was refused: loading a pickle runs the code that is in it. "
                "If you trust where it comes from, allow it with --trust-pickle"
            )
        if filename.endswith(SAFETENSORS):
            read_model(filename)  # refuses it: model files of the core come as checkpoints, by `model_files`
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        file = model_file_of(checkpoint["model"]) or ("the file" if self.complete else None)
        result = super()._load_model(checkpoint)
        lost = [*result.missing_keys, *(name for name, *_ in result.incorrect_shapes)]
        if file and lost:
            raise ValueError(
                f"{file} does not fit the model of the config: {len(lost)} weights are missing or have another shape, "
                f"such as {lost[0]}"
            )
        return result

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=False) if self.trust_pickle else read_checkpoint(f)
