"""Prediction by the processes of a Dask cluster: the results of one process, whatever dies on the way."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT, tiny_network
from PIL import Image

from kg_detectron.cli.main import main
from kg_detectron.export.ome_zarr import write_label_group
from kg_detectron.inference import cluster as cluster_module
from kg_detectron.inference import many_files, save_model
from kg_detectron.inference.local_workers import LocalWorkers
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.run_settings import Settings, Workers
from kg_detectron.io import ome_zarr
from kg_detectron.io.finding import Input
from kg_detectron.io.setting import SettingError

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

TRIES = 2


class DeadlyFile(distributed.WorkerPlugin):
    """A file called killer.png takes its worker with it, as a broken decoder would; any Zarr counts as a large one."""

    name = "deadly"

    def setup(self, worker: object) -> None:
        from kg_detectron.inference import opened_file
        from kg_detectron.io import ome_zarr

        ome_zarr._MAP_FROM = 0
        real = opened_file.open_image

        def deadly(path: Path, **options: object) -> object:
            if Path(path).name == "killer.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, **options)

        opened_file.open_image = deadly


class HungryFile(distributed.WorkerPlugin):
    """A file called hungry.png takes ever more memory, until its worker is killed."""

    name = "hungry"

    def setup(self, worker: object) -> None:
        from kg_detectron.inference import opened_file

        real = opened_file.open_image

        def hungry(path: Path, **options: object) -> object:
            taken = []
            while Path(path).name == "hungry.png":
                taken.append(np.ones(2**23, np.uint8))
                time.sleep(0.01)
            return real(path, **options)

        opened_file.open_image = hungry


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two worker processes."""
    with LocalWorkers(2) as workers, distributed.Client(workers.address, set_as_default=False) as client:
        client.register_plugin(DeadlyFile())
        yield workers.address


@pytest.fixture
def own_workers() -> Iterator[str]:
    """The same as ``--workers 2`` has them."""
    with LocalWorkers(2) as workers:
        yield workers.address


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_model(tiny_network(size=(32, 48), radius=2.0, smooth_sigma=1.0), path)
    return path


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i:03d}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones included, less those that hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", "images.csv"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def records(folder: Path) -> list[dict]:
    files = json.loads((folder / "run.json").read_text())["files"]
    return sorted(({**record, "seconds": 0} for record in files), key=lambda record: record["name"])


def workers_of(address: str) -> list[int]:
    with distributed.Client(address, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def test_results_are_those_of_one_process_and_are_not_made_twice(cluster: str, model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 5)
    (images / "broken.png").write_bytes(b"\x89PNG")
    alone, together = tmp_path / "alone", tmp_path / "together"
    settings = Settings(save=("labels", "roi"))
    predict_files([images], model, alone, settings)
    lines: list[str] = []
    summary = predict_files(
        [images], model, together, settings, workers=Workers(scheduler=cluster), say=lines.append, overwrite=True
    )
    assert (len(summary.done), len(summary.failed)) == (5, 1)
    assert contents(together) == contents(alone)
    assert records(together) == records(alone)
    assert len([line for line in lines if " cells, " in line]) == 5
    again = predict_files([images], model, together, settings, workers=Workers(scheduler=cluster))
    assert (len(again.done), len(again.skipped), len(again.failed)) == (0, 5, 1)
    # Results of other settings make room.
    predict_files([images], model, together, Settings(save=("csv",)), workers=Workers(scheduler=cluster))
    assert not list(together.glob("*.tif")) and len(list(together.glob("*_cells.csv"))) == 5


def test_a_worker_that_is_killed_costs_nothing(cluster: str, model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 8)
    predict_files([images], model, tmp_path / "alone")
    killed: list[int] = []

    def kill_at_the_second_file(line: str) -> None:
        if " cells, " in line and not killed:
            killed.extend(workers_of(cluster)[:1])
            os.kill(killed[0], signal.SIGKILL)

    workers = Workers(scheduler=cluster)
    summary = predict_files([images], model, tmp_path / "out", workers=workers, say=kill_at_the_second_file)
    assert killed and len(summary.done) == 8 and not summary.failed
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_file_that_kills_its_workers_is_named_and_the_rest_is_done(cluster: str, model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 3)
    (images / "image000.png").rename(images / "killer.png")
    workers = Workers(scheduler=cluster, tries=TRIES)
    summary = predict_files([images], model, tmp_path / "out", workers=workers)
    assert [record.name for record in summary.failed] == ["killer"] and len(summary.done) == 2
    assert f"its worker died {TRIES} times, at last with no other file at hand" in str(summary.failed[0].error)
    assert [record["name"] for record in records(tmp_path / "out") if record["error"]] == ["killer"]


def test_the_tiles_of_a_large_image_are_shared(
    cluster: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200), dtype=np.uint8)
    write_label_group(tmp_path / "large.zarr", [pixels], pixels.shape, "YX", None)
    monkeypatch.setattr(ome_zarr, "_MAP_FROM", 0)
    monkeypatch.setattr(cluster_module, "_COUNT_EVERY", 0.0)
    settings = Settings(save=("labels", "geojson"), scale=1.0, tile=64, normalise="percentile")
    predict_files([tmp_path / "large.zarr"], model, tmp_path / "alone", settings)
    steps, real = [], cluster_module._Queue.finish
    killed: list[int] = []

    def counted(self: object, step: cluster_module.Step, result: object) -> object:
        steps.append((step.kind, step.page, step.tile))
        if step.kind == "masks" and not killed:
            killed.extend(workers_of(cluster)[:1])
            os.kill(killed[0], signal.SIGKILL)
        return real(self, step, result)

    monkeypatch.setattr(cluster_module._Queue, "finish", counted)
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(many_files._StepsOfFiles, "__call__", lambda _, item, *steps: shown.append(steps))
    summary = predict_files(
        [tmp_path / "large.zarr"], model, tmp_path / "out", settings, workers=Workers(None, cluster)
    )
    assert shown == [(done, 26) for done in range(27)]
    assert not summary.failed and summary.cells > 50
    tiles = [(0, tile) for tile in range(12)]
    expected = [("file", 0, 0), ("boxes", 0, 0), ("join", 0, 0)]
    assert sorted(steps) == sorted([*expected, *((kind, *tile) for kind in ("peaks", "masks") for tile in tiles)])
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_store_that_no_record_knows_is_replaced(cluster: str, model: Path, tmp_path: Path) -> None:
    """A killed command may have moved results to their place and not written that down."""
    pytest.importorskip("zarr")
    images, settings = pictures(tmp_path / "images", 1), Settings(save=("zarr", "ome-tiff"))
    predict_files([images], model, tmp_path / "out", settings, workers=Workers(scheduler=cluster))
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / "run.json").unlink()
    summary = predict_files([images], model, tmp_path / "out", settings, workers=Workers(scheduler=cluster))
    assert len(summary.done) == 1 and contents(tmp_path / "out") == expected


def test_a_fault_in_a_tile_is_reported_once() -> None:
    task = cluster_module.Task(Input(Path("a.zarr"), "a"), None, ())
    queue = cluster_module._Queue()
    assert queue.finish(cluster_module.Step(task), cluster_module.Plan("0", [2, 1])) is None
    peaks = [queue.pop() for _ in range(3)]
    assert [(step.kind, step.page, step.tile) for step in peaks] == [("peaks", 0, 0), ("peaks", 0, 1), ("peaks", 1, 0)]
    for step, result in zip(peaks, (OSError("lost"), None, OSError("lost")), strict=True):
        assert queue.finish(step, result) is None
    join = queue.pop()
    assert join is not None and join.kind == "join" and queue.pop() is None
    outcome = queue.finish(join, OSError("lost"))
    assert outcome is not None and outcome.record.error == "OSError: lost"


def test_the_command_starts_workers_of_its_own(model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 2)
    options = [str(images), "-m", str(model), "--save", "labels", "-o"]
    assert main(["predict", *options, str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main(["predict", *options, str(tmp_path / "alone")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["device"] == "cpu" and manifest["settings"]["save"] == ["labels"]


def test_a_model_that_workers_do_not_have_stops_the_run(cluster: str, model: Path, tmp_path: Path) -> None:
    from kg_detectron.inference.cluster import Cluster, Job, WorkerUnfit

    job = Job(model, "0" * 64, Settings(), None, tmp_path, tmp_path, None)
    with Cluster(Workers(scheduler=cluster), print) as workers:
        with pytest.raises(WorkerUnfit, match="has no model of SHA-256 0000"):
            workers.describe(job)
        with pytest.raises(WorkerUnfit, match="does not see"):
            workers.describe(Job(model, "", Settings(), None, tmp_path, tmp_path / "nowhere", None))


def test_workers_are_checked_before_anything_is_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for values in ({}, {"count": 1, "scheduler": "tcp://a:1"}, {"count": 0}, {"scheduler": "a:1"}, {"tries": 0}):
        with pytest.raises(SettingError):
            Workers(**values)
    image = pictures(tmp_path / "images", 1)
    assert main(["predict", str(image), "-o", str(tmp_path / "out"), "--scheduler", "login:8786"]) == 2
    assert "--scheduler: expected an address such as tcp://HOST:8786, got 'login:8786'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_scheduler_that_restarts_is_waited_for(model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 12)
    predict_files([images], model, tmp_path / "alone", Settings(save=("labels",)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, processes, restarts = f"tcp://127.0.0.1:{port}", [], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> None:
        scheduler = ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show"]
        for options in (scheduler, ["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]):
            command = [sys.executable, "-m", "dask", *options]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))

    def restart_at_the_second_file(line: str) -> None:
        if " cells, " in line and not restarts:
            restarts.append(line)
            for process in processes:
                process.kill()
                process.wait()
            start()

    start()
    try:
        workers = Workers(scheduler=address)
        settings = Settings(save=("labels",))
        summary = predict_files(
            [images], model, tmp_path / "out", settings, workers=workers, say=restart_at_the_second_file
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert restarts and len(summary.done) == 12 and not summary.failed
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_control_c_stops_the_workers_and_the_command_goes_on(model: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the command and its workers alike."""
    images = pictures(tmp_path / "images", 6)
    predict_files([images], model, tmp_path / "alone", Settings(save=("labels",)))
    command = [sys.executable, "-c", "from kg_detectron.cli.main import main; raise SystemExit(main())", "predict"]
    command += [str(images), "-m", str(model), "-o", str(tmp_path / "out"), "--save", "labels", "--workers", "1"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(list((tmp_path / "out").glob("*_labels.tif"))) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate()
    assert process.returncode == 130 and "give the same command again to go on" in text
    assert "Traceback" not in text
    with pytest.raises(ProcessLookupError):  # nobody is left of the group
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    done = len(records(tmp_path / "out"))
    assert 1 <= done < 6
    summary = predict_files([images], model, tmp_path / "out", Settings(save=("labels",)))
    assert (len(summary.skipped), len(summary.done)) == (done, 6 - done)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_takes_too_much_memory_costs_its_file_alone(model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 3)
    (images / "image001.png").rename(images / "hungry.png")
    with (
        LocalWorkers(1, memory=1_500_000_000) as local,
        distributed.Client(local.address, set_as_default=False) as client,
    ):
        client.register_plugin(HungryFile())
        workers = Workers(scheduler=local.address, tries=TRIES)
        summary = predict_files([images], model, tmp_path / "out", Settings(save=("labels",)), workers=workers)
    assert [record.name for record in summary.failed] == ["hungry"] and len(summary.done) == 2
    assert "out of memory" in str(summary.failed[0].error)
    rows = (tmp_path / "out" / "images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if "out of memory" in row] == ["hungry.png"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_workers_killed_at_random_lose_nothing(own_workers: str, model: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 30)
    predict_files([images], model, tmp_path / "alone", Settings(save=("labels",)))
    chance, killers = random.Random(0), []
    left = 2  # files until the next worker is killed

    def kill(seconds: float) -> None:
        time.sleep(seconds)
        alive = workers_of(own_workers)
        for worker in chance.sample(alive, chance.randint(1, 2) if len(alive) == 2 else len(alive)):
            os.kill(worker, signal.SIGKILL)
            kills.append(worker)

    def count(line: str) -> None:
        nonlocal left
        left -= " cells, " in line
        if left <= 0:
            left = chance.randint(1, 3)
            killers.append(threading.Thread(target=kill, args=[chance.uniform(0, 0.3)]))
            killers[-1].start()

    kills: list[int] = []
    for run in range(12):
        out = tmp_path / f"out{run}"
        workers = Workers(scheduler=own_workers, tries=50)
        summary = predict_files([images], model, out, Settings(save=("labels",)), workers=workers, say=count)
        assert len(summary.done) == 30 and not summary.failed and not summary.skipped
        assert contents(out) == contents(tmp_path / "alone")
        if len(kills) >= 20:
            break
    for killer in killers:
        killer.join()
    assert len(kills) >= 20
