"""One Ray cluster with the whole service on it, started once for all tests that need it (about 15 s)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from actors.app import RayApp
from actors.service import RemoteGateway
from actors.settings import Settings, load_settings
from tests.stores import kill_server


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A running service: its settings (an embedded Redis of its own) and its gateway."""

    settings: Settings
    app: RayApp

    @property
    def gateway(self) -> RemoteGateway:
        """The gateway actor."""
        return RemoteGateway(self.app.gateway)

    def replica_pids(self, deployment: str) -> list[int]:
        """The processes of the replicas of `deployment` ("AudioEncoder" or "Decoder")."""
        pids = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::ServeReplica") and f":{deployment}" in title:
                    pids.append(process.pid)
        return pids

    def kill(self, deployment: str) -> None:
        """kill -9 the replicas of `deployment`."""
        for pid in self.replica_pids(deployment):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """The service on Ray with the default models; shared, so leave it as it was found."""
    data_dir = Path(tempfile.mkdtemp(prefix="surtitle-"))
    # float32 for partials too: what "auto" finds fastest is another thing on every machine.
    settings = load_settings("edge", environ={"SURTITLE_MODEL__PARTIAL_DTYPE": "float32"}).settings
    settings = settings.model_copy(update={"redis": settings.redis.model_copy(update={"data_dir": data_dir})})
    app = RayApp(settings)
    try:
        app.start()
        yield RayCluster(settings, app)
    finally:
        app.stop()
        kill_server(data_dir)
        shutil.rmtree(data_dir)
