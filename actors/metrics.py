"""What the service counts, for Prometheus. No stream ids as labels: their number is not bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from actors.cadence import CadencePolicy
from pipeline.items import Failure, Hypothesis, Job, Outcome, Snapshot
from pipeline.records import BaseRecord, FinalRecord, PartialRecord

if TYPE_CHECKING:
    from actors.fan_out import FanOut

_LATENCY_MS = (5, 10, 20, 40, 80, 160, 320, 640, 1_280, 2_560, 5_120, 10_240, 30_000)
_JOB_MS = (40, 160, 640, 1_280, 2_560, 5_120, 10_240, 30_000, 60_000, 120_000, 300_000)


class Metrics:
    """All metrics of one gateway, in a registry of their own. Implements `SessionObserver`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.streams_live = Gauge("surtitle_streams_live", "Streams that are live", registry=self.registry)
        self.streams_started = self._counter("surtitle_streams_started", "Streams that were admitted")
        self.streams_refused = self._counter("surtitle_streams_refused", "Streams that admission refused")
        self.streams_failed = self._counter("surtitle_streams_failed", "Streams that ended with a failure")
        self.nonfinite_samples = self._counter(
            "surtitle_nonfinite_samples", "NaN and infinite samples, taken as zero, of media heard to their end"
        )
        self.records = self._counter("surtitle_records", "Records handed to the publisher, by kind", "kind")
        self.guards = self._counter("surtitle_guards_fired", "Hypotheses that a guard cut or emptied", "guard")
        self.snapshots = self._counter("surtitle_snapshots", "Snapshots submitted to the stages", "kind")
        self.failures = self._counter("surtitle_failures", "Snapshots or tasks without a hypothesis", "kind")
        self.superseded = self._counter("surtitle_superseded", "Partials overtaken before they were sent")
        self.retries = self._counter("surtitle_retries", "Finals submitted again after a stage was lost")
        self.stage_losses = self._counter("surtitle_stage_losses", "Calls lost with a stage")
        self.duplicates = Gauge(
            "surtitle_duplicates", "Entries that the store held already, since the start", registry=self.registry
        )
        self.queue_wait_ms = self._histogram("surtitle_queue_wait_ms", "From submission to the call that carries it")
        self.encode_ms = self._histogram(
            "surtitle_encode_ms", "One encoder call, its wait for the call before it included"
        )
        self.decode_ms = self._histogram("surtitle_decode_ms", "From the end of encoding to each outcome")
        self.jobs = self._counter(
            "surtitle_jobs",
            "Descriptions, summaries and answers that are over, by what came of them",
            "kind",
            "outcome",
        )
        self.keyframes_dropped = self._counter(
            "surtitle_keyframes_dropped", "Keyframes that nobody looked at because a newer one came first"
        )
        self.readers = self._gauge("surtitle_readers", "Clients that follow a stream over HTTP")
        self.streams_watched = self._gauge("surtitle_streams_watched", "Streams that they follow")
        self.slow_readers = self._gauge("surtitle_slow_readers", "Clients closed because they read too slowly")
        self.jobs_waiting = Gauge("surtitle_jobs_waiting", "Jobs that wait for a call", registry=self.registry)
        self.job_ms = Histogram(
            "surtitle_job_ms",
            "From the submission of a job to its answer",
            ["kind"],
            buckets=_JOB_MS,
            registry=self.registry,
        )
        self.cadence_ms = self._histogram("surtitle_partial_cadence_ms", "Sound between two partials of one utterance")
        self.cadence_target_ms = Gauge(
            "surtitle_partial_cadence_target_ms",
            "Sound between two partials of one utterance that the stages can bear now",
            registry=self.registry,
        )
        self.stage_utilisation = Gauge(
            "surtitle_stage_utilisation",
            "Share of the last seconds that a stage was busy, as the cadence goes by it",
            ["stage"],
            registry=self.registry,
        )
        self._last_end_ms: dict[str, tuple[int, int]] = {}

    def on_record(self, record: BaseRecord) -> None:
        """Count `record`, which was handed to the publisher."""
        self.records.labels(kind=str(getattr(record, "kind", "unknown"))).inc()
        if isinstance(record, PartialRecord):
            utterance, end_ms = self._last_end_ms.get(record.stream, (0, 0))
            if utterance == record.utterance:
                self.cadence_ms.observe(record.end_ms - end_ms)
            self._last_end_ms[record.stream] = (record.utterance, record.end_ms)
        elif isinstance(record, FinalRecord):
            self._last_end_ms.pop(record.stream, None)

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Count `snapshot`, which is about to be submitted."""
        self.snapshots.labels(kind="final" if snapshot.is_final else "partial").inc()

    def on_outcome(self, _snapshot: Snapshot, outcome: Outcome) -> None:
        """Count `outcome`."""
        if isinstance(outcome, Hypothesis) and outcome.guard is not None:
            self.guards.labels(guard=outcome.guard).inc()
        elif isinstance(outcome, Failure):
            self.failures.labels(kind=outcome.kind.value).inc()

    def on_job(self, job: Job, outcome: Outcome, elapsed_ms: float) -> None:
        """Count `job`, which is over after `elapsed_ms`."""
        kind = job.task.kind.value
        if isinstance(outcome, Failure):
            self.jobs.labels(kind=kind, outcome=outcome.kind.value).inc()
            return
        self.jobs.labels(kind=kind, outcome="answered").inc()
        self.job_ms.labels(kind=kind).observe(elapsed_ms)
        if outcome.guard is not None:
            self.guards.labels(guard=outcome.guard).inc()

    def on_keyframes_dropped(self, num_keyframes: int) -> None:
        """Count keyframes that nobody will look at."""
        self.keyframes_dropped.inc(num_keyframes)

    def on_cadence(self, policy: CadencePolicy) -> None:
        """Show what the cadence of partials is now, and why."""
        self.cadence_target_ms.set(policy.cadence_ms)
        self.stage_utilisation.labels(stage="encoder").set(policy.encoder_utilisation)
        self.stage_utilisation.labels(stage="decoder").set(policy.decoder_utilisation)

    def on_readers(self, fan_out: FanOut) -> None:
        """Show who follows streams now."""
        self.readers.set(fan_out.num_readers)
        self.streams_watched.set(fan_out.num_feeds)
        self.slow_readers.set(fan_out.num_slow)

    def forget(self, stream_id: str) -> None:
        """Drop what is remembered of a stream that has ended."""
        self._last_end_ms.pop(stream_id, None)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_LATENCY_MS, registry=self.registry)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
