"""What the server counts, under the names that dashboards know from vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The figures of one engine; each engine has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("num_requests_running", "Texts that are being written.")
        self.waiting = self._gauge("num_requests_waiting", "Texts that wait for a place.")
        self.cache = self._gauge("kv_cache_usage_perc", "Cached tokens, as a part of 1 of what fits.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were read.")
        self.new_tokens = self._counter("generation_tokens", "Tokens that were written.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were written.")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.between = self._histogram("inter_token_latency_seconds", "From one token to the next.", STEPS)
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self.queued = self._histogram("request_queue_time_seconds", "From arrival to the prefill.", SECONDS)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"calmlm:{name}", about, registry=self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"calmlm:{name}", about, ["model_name"], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"calmlm:{name}", about, ["model_name"], buckets=buckets, registry=self.registry)


class FleetMetrics:
    """The figures of several replicas, and of the desk before them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.retries = Counter(
            "calmlm:request_retries",
            "Requests that were sent again since their replica was lost.",
            registry=self.registry,
        )

    def page(self, replicas: Mapping[str, Sequence[Metric]]) -> bytes:
        """All figures in Prometheus' text format, those of each replica with its name as the label ``replica``."""
        merged: dict[str, Metric] = {}
        for replica, families in replicas.items():
            for family in families:
                one = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                one.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
                ]

        class Found:
            def collect(self) -> Iterator[Metric]:
                yield from merged.values()

        whole = CollectorRegistry()
        whole.register(Found())  # type: ignore[arg-type]
        return generate_latest(whole) + generate_latest(self.registry)
