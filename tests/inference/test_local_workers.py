"""Worker processes on this machine: there are always as many as asked for."""

import os
import signal
import time

import pytest

distributed = pytest.importorskip("distributed")

from kg_detectron.inference.local_workers import LocalWorkers  # noqa: E402


def test_a_worker_that_dies_while_it_starts_is_replaced() -> None:
    """Dask starts a worker anew that dies later, and gives up one that dies then."""
    with LocalWorkers(1) as workers, distributed.Client(workers.address, set_as_default=False) as client:
        while not (starting := [nanny.pid for nanny in list(workers._cluster._created) if nanny.pid]):
            time.sleep(0.01)
        (first,) = starting
        os.kill(first, signal.SIGKILL)
        assert not client.scheduler_info()["workers"]
        client.wait_for_workers(1, timeout=240)
        (second,) = client.run(os.getpid).values()
        assert second not in (first, os.getpid())
        (blocked,) = client.run(lambda: signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())).values()
        assert blocked, "Ctrl-C is for the command, not for its workers"
    assert workers._cluster.status == distributed.core.Status.closed
