"""Parameters of the service itself: its door, its admission, and the Ray cluster that it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.params import Params

HostName = Annotated[str, Field(max_length=253, pattern=r"^((\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])$")]


class ServiceParams(Params):
    """The HTTP door and admission."""

    host: str = Field(
        default="127.0.0.1", min_length=1, max_length=253, description="address the HTTP API listens on; loopback only"
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        default=(),
        max_length=64,
        description="names that a request may be for (its Host header), *.example.org for all below one; none: any, "
        "on loopback only the loopback's",
    )
    port: int = Field(default=8_321, ge=0, le=65_535, description="port of the HTTP API; 0: any free one")
    max_streams: int = Field(default=16, ge=1, le=10_000, description="live streams; more are refused (HTTP 503)")
    retry_after_s: int = Field(default=15, ge=1, le=3_600, description="Retry-After of a refusal")
    max_upload_mb: int = Field(
        default=100, ge=1, le=10_000, description="largest file that may be sent to be transcribed; HTTP 413 beyond"
    )
    drain_timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="how long a stop waits for the last finals of all streams"
    )
    start_timeout_s: float = Field(
        default=120.0, gt=0, le=3_600, description="how long models and cluster may take to start"
    )


class RayParams(Params):
    """The Ray cluster: an own one of this machine, or an existing one."""

    address: str | None = Field(
        default=None, max_length=253, description="HOST:PORT of an existing cluster, or auto; none: start an own one"
    )
    num_cpus: int = Field(default=0, ge=0, le=4_096, description="cores an own cluster may use; 0: those there are")
    object_store_mb: int = Field(
        default=256, ge=80, le=1_048_576, description="shared memory of an own cluster, for samples and embeddings"
    )
    temp_dir: Path | None = Field(
        default=None, description="where an own cluster keeps sockets and logs (short path); none: a new one in /tmp"
    )
    num_encoder_replicas: int = Field(default=1, ge=1, le=1_024, description="AudioEncoder replicas")
    num_vision_replicas: int = Field(
        default=1, ge=1, le=1_024, description="VisionEncoder replicas, where the tier has eyes"
    )
    num_decoder_replicas: int = Field(default=1, ge=1, le=1_024, description="Decoder replicas")
    num_gpus_per_replica: float = Field(default=0.0, ge=0, le=8, description="GPUs (or a share of one) of each replica")
    health_check_period_s: float = Field(
        default=2.0, ge=0.5, le=60, description="how often replicas are checked; a dead one is replaced then"
    )
