"""The graph, once: the Ray cluster, the Serve applications and the gateway actor.

    gateway actor (sessions, publisher, HTTP) ─┬─ AudioEncoder deployment ───┬─ Decoder deployment
                                               └─ VisionEncoder deployment ──┘
                                                  (tier phi4 only)

Everything starts concurrently: the gateway's process and the replicas load while the others do.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.settings import Settings
from actors.threads import COMPUTE_ENVIRONMENT
from pipeline.errors import ServiceError
from pipeline.models.tier import tier_of

if TYPE_CHECKING:
    from actors.gateway import GatewayInfo

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Told what is being done now, in a few words for people."""

GATEWAY_NAME = "surtitle-gateway"
NAMESPACE = "surtitle"

_REPLICA_CPUS = 0.1  # bookkeeping only: the models' threads are set in model.encoder_threads and decoder_threads
_DECODER_MAX_CALLS = 64
_EYES_MAX_CALLS = 2  # jobs with frames, and jobs with frames and sound
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would run its workers at nice 15: whatever else the machine does would come before the captions.
    "RAY_worker_niceness": "0",
    # The gateway is asynchronous: a router thread of its own would only add a hop to every call.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # What Serve counts of its calls is handed to Ray's metrics ten times a second otherwise, call or no call.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
}
_OWN_CLUSTER_ENVIRONMENT = {
    # Ray's own metrics and the events that its dashboard lists tasks from: a cluster of our own has no dashboard, and
    # the service has /metrics.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Serve's controller asks for the state of nodes, replicas and applications ten times a second otherwise. A replica
    # that died is replaced half a second later, which is little beside the loading of its model.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""What a cluster of our own need not do, unless somebody sets it (docs/performance.md, "What is not the models")."""


class RayApp:
    """A running service on Ray: `start`, then `gateway` is the handle of its actor, then `stop`."""

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self._settings = settings
        self._progress = progress or (lambda _text: None)
        self._temp_dir: Path | None = None
        self._is_own_cluster = settings.ray.address is None
        self._is_cancelled = threading.Event()
        self.gateway: Any = None

    def start(self, *, serves_http: bool = False) -> GatewayInfo:
        """Start or join the cluster, deploy the stages and the gateway; return when streams can be started.

        Blocks for seconds. After an error, call `stop`.

        Raises:
            ServiceError: if the cluster, a stage or the door does not start.
            ModelError: if the weights cannot be used.
            StoreError: if Redis cannot be used.
        """
        self._report("starting Ray")
        self._start_ray()
        self._report("starting the gateway")
        # The actor's process imports its modules while Serve's controller starts.
        self.gateway = self._create_gateway()
        self._report("deploying the stages")
        self._deploy()
        ready = self.gateway.start.remote(serves_http=serves_http)
        self._report("loading the models")
        return self._await_gateway(ready)

    def cancel(self) -> None:
        """Make a `start` that goes on in another thread end soon, with a ServiceError."""
        self._is_cancelled.set()

    def stop(self) -> None:
        """Take the applications and the gateway down, and the cluster if it is this process's own. Idempotent."""
        import ray  # noqa: PLC0415 - see _start_ray

        if ray.is_initialized():
            # The processes of an own cluster end with it; taking them down one by one would only take longer.
            if not self._is_own_cluster:
                self._take_down()
            ray.shutdown()
        self.gateway = None
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None

    def _take_down(self) -> None:
        import ray  # noqa: PLC0415 - see _start_ray
        from ray import serve  # noqa: PLC0415

        from actors.serve_stages import DECODER_APP, ENCODER_APP, EYES_APP  # noqa: PLC0415

        if self.gateway is None:  # then none was started, or another one runs there
            return
        ray.kill(self.gateway)
        running = serve.status().applications
        for name in (ENCODER_APP, DECODER_APP, EYES_APP):
            if name in running:
                serve.delete(name, _blocking=False)

    def _report(self, text: str) -> None:
        self._check_cancelled()
        self._progress(text)

    def _check_cancelled(self) -> None:
        if self._is_cancelled.is_set():
            raise ServiceError("the start was cancelled")

    def _start_ray(self) -> None:
        params = self._settings.ray
        environment = dict(_RAY_ENVIRONMENT)
        if self._is_own_cluster:
            # Ray switches token authentication on for a cluster of its own, and would keep the token in the home
            # directory. This one is for this cluster alone and written nowhere; its processes inherit it.
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            environment |= _OWN_CLUSTER_ENVIRONMENT
        for name, value in (environment | COMPUTE_ENVIRONMENT).items():
            os.environ.setdefault(name, value)

        # Ray reads its environment when it is imported.
        import ray  # noqa: PLC0415

        try:
            if not self._is_own_cluster:
                ray.init(address=params.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
                return
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=params.num_cpus or len(os.sched_getaffinity(0)),
                num_gpus=None,
                include_dashboard=False,
                object_store_memory=params.object_store_mb * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._choose_temp_dir()),
            )
        except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as exc:
            where = params.address or "on this machine"
            raise ServiceError(f"Ray did not start {where}: {_last_line(exc)}") from exc

    def _choose_temp_dir(self) -> Path:
        if self._settings.ray.temp_dir is not None:
            return self._settings.ray.temp_dir
        # /tmp whatever TMPDIR says: the paths of Ray's Unix sockets may have 107 bytes at most.
        self._temp_dir = Path(tempfile.mkdtemp(prefix="surtitle-", dir="/tmp"))
        return self._temp_dir

    def _create_gateway(self) -> Any:
        import ray  # noqa: PLC0415 - see _start_ray

        from actors.gateway import Gateway  # noqa: PLC0415 - it needs Redis and media libraries, commands may not

        options: dict[str, Any] = {"name": GATEWAY_NAME, "num_cpus": 0, "max_restarts": 0, "max_concurrency": 10_000}
        if not self._is_own_cluster:
            options["runtime_env"] = {"env_vars": _RAY_ENVIRONMENT_OF_WORKERS}
        try:
            return ray.remote(Gateway).options(**options).remote(self._settings)
        except ValueError as exc:
            raise ServiceError(
                f"the cluster at {self._settings.ray.address} runs a gateway {GATEWAY_NAME!r} already: stop it first"
            ) from exc

    def _deploy(self) -> None:
        from ray import serve  # noqa: PLC0415 - see _start_ray

        from actors.audio_encoder import AudioEncoder  # noqa: PLC0415
        from actors.decoder import Decoder  # noqa: PLC0415
        from actors.serve_stages import DECODER, DECODER_APP, ENCODER, ENCODER_APP  # noqa: PLC0415

        # It tells every start to stderr, where people read their captions.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        settings = self._settings
        deployment: Any = serve.deployment
        encoder = deployment(AudioEncoder).options(
            name=ENCODER,
            num_replicas=settings.ray.num_encoder_replicas,
            max_ongoing_requests=settings.dispatch.max_calls_per_replica,
            **self._deployment_options(),
        )
        decoder = deployment(Decoder).options(
            name=DECODER,
            num_replicas=settings.ray.num_decoder_replicas,
            max_ongoing_requests=_DECODER_MAX_CALLS,
            **self._deployment_options(),
        )
        serve.start(proxy_location="Disabled")
        targets = [
            serve.RunTarget(encoder.bind(settings.model, settings.encoder), name=ENCODER_APP, route_prefix=None),
            serve.RunTarget(decoder.bind(settings.model, settings.decoder), name=DECODER_APP, route_prefix=None),
        ]
        if tier_of(settings.model) == "phi4":
            targets.append(self._make_eyes())
        # The controller makes deployments in its next round; before that a handle to one is an error.
        serve.run_many(targets, wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)

    def _make_eyes(self) -> Any:
        from ray import serve  # noqa: PLC0415 - see _start_ray

        from actors.serve_stages import EYES, EYES_APP  # noqa: PLC0415
        from actors.vision_encoder import VisionEncoder  # noqa: PLC0415

        settings = self._settings
        deployment: Any = serve.deployment
        eyes = deployment(VisionEncoder).options(
            name=EYES,
            num_replicas=settings.ray.num_vision_replicas,
            max_ongoing_requests=_EYES_MAX_CALLS,
            **self._deployment_options(),
        )
        return serve.RunTarget(eyes.bind(settings.model, settings.vision), name=EYES_APP, route_prefix=None)

    def _deployment_options(self) -> dict[str, Any]:
        actor_options: dict[str, Any] = {"num_cpus": _REPLICA_CPUS}
        if self._settings.ray.num_gpus_per_replica:
            actor_options["num_gpus"] = self._settings.ray.num_gpus_per_replica
        if not self._is_own_cluster:
            actor_options["runtime_env"] = {"env_vars": _RAY_ENVIRONMENT_OF_WORKERS}
        return {
            "ray_actor_options": actor_options,
            "health_check_period_s": self._settings.ray.health_check_period_s,
            "graceful_shutdown_timeout_s": 10.0,
            "graceful_shutdown_wait_loop_s": 0.5,
            "max_constructor_retry_count": 2,
            # When every replica is busy the router asks again after this long; Serve's 25 to 500 ms would be idle time.
            "request_router_config": {"initial_backoff_s": 0.005, "backoff_multiplier": 2.0, "max_backoff_s": 0.02},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        }

    def _await_gateway(self, ready: Any) -> GatewayInfo:
        """Wait for the gateway's start, and look meanwhile whether a stage has failed for good."""
        import ray  # noqa: PLC0415 - see _start_ray
        from ray.exceptions import RayActorError, RayTaskError  # noqa: PLC0415

        deadline = time.monotonic() + self._settings.service.start_timeout_s
        while time.monotonic() < deadline:
            self._check_cancelled()
            done, _ = ray.wait([ready], timeout=1.0)
            if done:
                try:
                    info: GatewayInfo = ray.get(ready)
                except RayTaskError as exc:
                    raise exc.cause from None
                except RayActorError as exc:
                    raise ServiceError(f"the gateway died while starting: {_last_line(exc)}") from exc
                return info
            _raise_if_failed()
        raise ServiceError(
            f"the stages did not start within service.start_timeout_s = {self._settings.service.start_timeout_s:.0f} s"
        )


_RAY_ENVIRONMENT_OF_WORKERS = {
    **COMPUTE_ENVIRONMENT,
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
}


def _raise_if_failed() -> None:
    from ray import serve  # noqa: PLC0415 - see RayApp._start_ray

    for name, application in serve.status().applications.items():
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
            reason = _error_line(messages[0] if messages else application.message)
            raise ServiceError(f"{name} did not start: {reason}")


def _error_line(message: str) -> str:
    """Return the last line of the traceback in a deployment's message: that is where the reason stands."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if ("Error: " in line or "Exception: " in line) and not line.startswith("File")]
    return (errors or lines or ["no reason was given"])[-1]


def _last_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[-1] if lines else type(exc).__name__
