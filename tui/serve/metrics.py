"""`GET /metrics`: counts for Prometheus. Nothing of what was asked or answered is in them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .backend import Activity, Backend

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counts of one server."""

    def __init__(self, backend: Backend):
        self._backend, self._registry = backend, CollectorRegistry()
        backend.on_end = self._count
        self.requests = Counter(
            "qchat_requests", "Requests by path and how they ended", ["path", "end"], registry=self._registry
        )
        self._tokens = Counter(
            "qchat_tokens",
            "Tokens of prompts (read or cached) and of replies (reasoning or answer)",
            ["kind"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "qchat_seconds_to_first_token",
            "Seconds from a request to its first token, waiting included",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._speed = self._gauge("tokens_per_second", "Tokens per second of the last reply")
        self._add_live_gauges()

    def text(self) -> bytes:
        """Return all counts in Prometheus' format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, help_: str) -> Gauge:
        return Gauge(f"qchat_{name}", help_, registry=self._registry)

    def _add_live_gauges(self) -> None:
        backend = self._backend
        self._gauge("requests_waiting", "Requests that wait for their turn").set_function(
            lambda: backend.queue.waiting
        )
        self._gauge("requests_running", "Requests that the engine replies to").set_function(
            lambda: sum(one.running for one in backend.activities.values())
        )
        self._gauge("memory_active_bytes", "Memory that the model, caches and snapshots take").set_function(
            lambda: backend.memory.active_nbytes if backend.memory else 0
        )
        self._gauge("memory_limit_bytes", "Memory that the device allows").set_function(
            lambda: backend.memory.limit_nbytes if backend.memory else 0
        )

    def _count(self, activity: Activity) -> None:
        done = activity.done
        self.requests.labels(activity.path, activity.end).inc()
        if activity.first_token is not None:
            self._first_token.observe(activity.first_token - activity.begun)
        if done is None:
            self._tokens.labels("generated").inc(activity.generated_tokens)
            return
        counts = {
            "cached": done.cached_tokens,
            "read": done.prefilled_tokens,
            "reasoning": done.reasoning_tokens,
            "answer": done.generated_tokens - done.reasoning_tokens,
        }
        for kind, tokens in counts.items():
            self._tokens.labels(kind).inc(tokens)
        if done.performance.decode_tokens_per_s:
            self._speed.set(done.performance.decode_tokens_per_s)
