"""Checkpoints are whole: a process killed, or out of disk, at any moment of a save leaves one to go on from."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from kg_detectron.d2 import checkpointer as checkpoint
from kg_detectron.d2.checkpointer import WholeCheckpointer


def checkpointer(folder: Path, value: float = 0.0) -> WholeCheckpointer:
    model = nn.Linear(200, 200)
    nn.init.constant_(model.weight, value)
    return WholeCheckpointer(model, str(folder))


def loaded(folder: Path) -> tuple[float, int]:
    """Weight and iteration of the checkpoint that a resumed run takes."""
    fresh = checkpointer(folder, -1.0)
    extra = fresh.resume_or_load("", resume=True)
    assert len(fresh.model.weight.unique()) == 1
    return fresh.model.weight[0, 0].item(), extra["iteration"]


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpointer(tmp_path, 1.0).save("model_0000001", iteration=1)
    assert loaded(tmp_path) == (1.0, 1)
    return tmp_path


@pytest.mark.parametrize("name", ["model_0000001", "model_0000002"])
def test_killed_at_any_moment_of_a_save(saved, monkeypatch, name):
    """SIGKILL in a child process before each write, each flush to the disk and each renaming."""
    outcomes = []
    for moment in range(100):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # threads do not survive a fork, and would be waited for
            calls = iter(range(100))

            def kill_or(act, calls=calls, moment=moment):
                def perhaps(*arguments, **options):
                    if next(calls) == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return act(*arguments, **options)

                return perhaps

            def save_in_parts(data, stream):
                torch.serialization.save(data, stream)  # all of it ...
                length = stream.tell()
                stream.truncate(length // 2)  # ... of which half is there when the process is killed
                stream.flush()
                kill_or(lambda: None)()
                stream.seek(0)
                torch.serialization.save(data, stream)

            monkeypatch.setattr(checkpoint.torch, "save", save_in_parts)
            for function in ("fsync", "replace", "open"):
                monkeypatch.setattr(os, function, kill_or(getattr(os, function)))
            checkpointer(saved, 2.0).save(name, iteration=2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.append(loaded(saved))
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert len(outcomes) > 8 and outcomes[0] == (1.0, 1) and outcomes[-1] == (2.0, 2)
    assert set(outcomes) == {(1.0, 1), (2.0, 2)}
    names = {path.name for path in saved.iterdir()}
    assert names == {"last_checkpoint", "model_0000001.pth", f"{name}.pth"}  # the last save took the leftovers


def test_disk_full(saved, monkeypatch):
    class FullDisk:
        def __init__(self, stream):
            self.stream, self.left = stream, 20_000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

        def flush(self):
            self.stream.flush()

    save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda data, stream: save(data, FullDisk(stream)))
    with pytest.raises(OSError, match=r"model_0000002\.pth was not written: No space.*model_0000001\.pth") as error:
        checkpointer(saved, 2.0).save("model_0000002", iteration=2)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert loaded(saved) == (1.0, 1)
    assert {path.name for path in saved.iterdir()} == {"last_checkpoint", "model_0000001.pth"}


def test_the_operating_system_refuses_to_write_on(saved):
    """The same by a limit of the kernel on the size of files, for the checkpoint that is being replaced too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"model_0000001\.pth was not written: File too large"):
            checkpointer(saved, 2.0).save("model_0000001", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert loaded(saved) == (1.0, 1)


def test_broken_weights_are_not_saved(saved):
    broken = checkpointer(saved, 2.0)
    with torch.no_grad():
        broken.model.bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"weights bias are not finite.*model_0000001\.pth"):
        broken.save("model_0000002", iteration=2)
    assert loaded(saved) == (1.0, 1) and not (saved / "model_0000002.pth").exists()


def test_checkpoints_are_data(saved):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(saved / "made by a checkpoint"),)

    torch.save({"model": Code()}, saved / "model_0000001.pth")
    with pytest.raises(Exception, match="could run code"):
        loaded(saved)
    assert not (saved / "made by a checkpoint").exists()
