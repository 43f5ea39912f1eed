"""What /metrics and /status.json of a fleet say: every replica's own figures, by its name.

Owns how answers of replicas become one. Nothing is summed: who reads metrics sums them over the label ``replica``.
Needs prometheus_client.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

UP = "yafsdp_like_replica_up"


class ReplicaAnswer(NamedTuple):
    """A replica's answer, whole."""

    status: int
    content: bytes


NO_ANSWER = ReplicaAnswer(503, b"the replica is lost, or takes too long to answer")  # in place of one


class _Families:
    """What a registry collects."""

    def __init__(self) -> None:
        self._found: dict[str, Metric] = {}

    def add(self, replica: str, metric: Metric) -> None:
        """Take a replica's samples, with its name as a label."""
        family = self._found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        for sample in metric.samples:
            family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)

    def collect(self) -> Iterable[Metric]:
        """Return all of them."""
        return self._found.values()


def merged_metrics(answers: Mapping[str, ReplicaAnswer]) -> bytes:
    """Return the metrics of all replicas as Prometheus reads them, and `UP`: 0 for one that has not said its own."""
    families = _Families()
    for replica, answer in answers.items():
        up = Metric(UP, "1 for a replica that has answered with its metrics, 0 for one that has not", "gauge")
        up.add_sample(UP, {}, float(answer.status == 200))
        families.add(replica, up)
        if answer.status == 200:
            for metric in text_string_to_metric_families(answer.content.decode()):
                families.add(replica, metric)
    registry = CollectorRegistry()
    registry.register(families)
    return generate_latest(registry)


def merged_status(answers: Mapping[str, ReplicaAnswer]) -> bytes:
    """Return ``{"replicas": {name: what its own /status.json says}}``; of one that does not say it, its problem."""
    found: dict[str, Any] = {}
    for replica, answer in answers.items():
        problem = {"problem": f"status {answer.status}: {answer.content.decode(errors='replace')}"}
        found[replica] = json.loads(answer.content) if answer.status == 200 else problem
    return json.dumps({"replicas": found}).encode()
