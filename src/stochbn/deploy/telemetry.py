"""What a service tells of itself, for Prometheus: by its own page, or by Ray, which has one for all replicas."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["METRICS", "Metric", "Telemetry", "prometheus", "ray_metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the ``stochbn_`` before it.
        kind: what it is.
        about: one sentence.
        labels: what its values are told apart by.
        buckets: upper ends of those of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("requests", "counter", "Requests for predictions that were answered, by status.", ("status",)),
    Metric("request_seconds", "histogram", "From the first byte of a request to its answer.", buckets=SECONDS),
    Metric("batch_seconds", "histogram", "All passes over a batch.", buckets=SECONDS),
    Metric("batch_examples", "histogram", "Examples in a batch.", buckets=COUNTS),
    Metric("draws", "histogram", "Draws for each example, in the mean over a batch.", buckets=COUNTS),
    Metric("examples", "counter", "Examples that were predicted."),
    Metric("shift_alarm", "gauge", "1 while the examples differ from the training data, else 0."),
    Metric("shift_evidence", "gauge", "Evidence against examples that are like the training data."),
)
"""All that a service tells."""

Record = Callable[[float, Mapping[str, str]], None]
"""Takes a value and labels: adds to a counter or histogram, or sets a gauge."""


class Telemetry:
    """Metrics of a service.

    Args:
        make: makes a metric, and returns how it is recorded.
        page: the text that Prometheus reads and its content type; None where it is read elsewhere.
    """

    def __init__(self, make: Callable[[Metric], Record], page: Callable[[], tuple[bytes, str]] | None = None) -> None:
        self.page = page
        self._records = {metric.name: make(metric) for metric in METRICS}

    def request(self, status: int, seconds: float) -> None:
        """A request was answered."""
        self._record("requests", 1, status=str(status))
        self._record("request_seconds", seconds)

    def batch(self, examples: int, seconds: float, draws: float) -> None:
        """A batch was predicted, with so many draws for an example."""
        self._record("batch_seconds", seconds)
        self._record("batch_examples", examples)
        self._record("examples", examples)
        self._record("draws", draws)

    def shift(self, alarm: bool, evidence: float) -> None:
        """What the monitor tells now."""
        self._record("shift_alarm", alarm)
        self._record("shift_evidence", evidence)

    def _record(self, name: str, value: float, **labels: str) -> None:
        self._records[name](value, labels)


def prometheus() -> Telemetry:
    """Metrics with a page for Prometheus.

    Several worker processes of one service share a page if ``PROMETHEUS_MULTIPROC_DIR`` names an empty folder.

    Raises:
        ImportError: prometheus_client is not installed.
    """
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
        multiprocess,
    )

    registry = CollectorRegistry()

    def make(metric: Metric) -> Record:
        name = f"stochbn_{metric.name}"
        given: dict[str, Any] = {"labelnames": metric.labels, "registry": registry}
        if metric.kind == "counter":
            counter = Counter(name, metric.about, **given)
            return lambda value, labels: (counter.labels(**labels) if labels else counter).inc(value)
        if metric.kind == "gauge":
            gauge = Gauge(name, metric.about, multiprocess_mode="livemax", **given)
            return lambda value, labels: gauge.set(value)
        histogram = Histogram(name, metric.about, buckets=metric.buckets, **given)
        return lambda value, labels: histogram.observe(value)

    def page() -> tuple[bytes, str]:
        read = registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            read = CollectorRegistry()
            collect: Any = multiprocess.MultiProcessCollector  # which has no types
            collect(read)
        return generate_latest(read), CONTENT_TYPE_LATEST

    return Telemetry(make, page)


def ray_metrics() -> Telemetry:
    """Metrics of a replica of Ray Serve: Ray adds ``ray_`` to their names and labels that tell replicas apart.

    Raises:
        ImportError: Ray Serve is not installed.
    """
    from ray.serve import metrics

    def make(metric: Metric) -> Record:
        name = f"stochbn_{metric.name}"
        tags: Any = metric.labels  # of any number, whatever their type says
        if metric.kind == "counter":
            counter = metrics.Counter(name, metric.about, tag_keys=tags)
            return lambda value, labels: counter.inc(value, tags=dict(labels))
        if metric.kind == "gauge":
            gauge = metrics.Gauge(name, metric.about, tag_keys=tags)
            return lambda value, labels: gauge.set(value, tags=dict(labels))
        histogram = metrics.Histogram(name, metric.about, boundaries=list(metric.buckets), tag_keys=tags)
        return lambda value, labels: histogram.observe(value, tags=dict(labels))

    return Telemetry(make)
