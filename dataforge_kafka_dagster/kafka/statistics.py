"""What librdkafka measures of itself, in a few numbers.

Source: https://github.com/confluentinc/librdkafka/blob/master/STATISTICS.md.
"""

from __future__ import annotations

import orjson


class Statistics:
    """Takes librdkafka's statistics as they come, and keeps what a publication's metadata says of them."""

    def __init__(self) -> None:
        self._seen = False
        self._retries = 0
        self._queued = 0
        self._throttled = 0.0
        self._median = 0.0
        self._slowest = 0.0

    def take(self, text: str) -> None:
        """One report of librdkafka, JSON. A callback: it records and never raises."""
        try:
            report = orjson.loads(text)
            brokers = [broker for broker in report["brokers"].values() if broker["nodeid"] >= 0]
            self._retries = sum(broker["txretries"] for broker in brokers)
            self._queued = max(self._queued, report["msg_cnt"])
            self._throttled += sum(broker["throttle"]["sum"] for broker in brokers)
            for broker in brokers:
                if broker["rtt"]["cnt"]:
                    self._seen = True
                    self._median = max(self._median, broker["rtt"]["p50"] / 1000)
                    self._slowest = max(self._slowest, broker["rtt"]["p99"] / 1000)
        except (ValueError, KeyError, TypeError):
            return

    @property
    def throttled(self) -> float:
        """For how long brokers have held requests back by quota, milliseconds."""
        return self._throttled

    def summary(self) -> dict[str, float]:
        """The numbers, by name; none if no request was measured, as in one that sends for less than a second.

        ``latency_p50_ms`` and ``latency_p99_ms``: of requests to the slowest broker in the slowest second;
        ``request_retries``: requests that were sent again; ``most_queued_records``: that waited at once;
        ``throttled_ms``: for how long brokers held requests back by quota. These three only if they are not 0.
        """
        if not self._seen:
            return {}
        trouble = {
            "request_retries": self._retries,
            "most_queued_records": self._queued,
            "throttled_ms": round(self._throttled, 2),
        }
        return {
            "latency_p50_ms": round(self._median, 2),
            "latency_p99_ms": round(self._slowest, 2),
            **{name: number for name, number in trouble.items() if number},
        }
