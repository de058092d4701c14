"""Audit lines as log records of OpenTelemetry, sent to a collector by OTLP over HTTP, as JSON.

A line counts as written once the collector has taken it: until then no verdict leaves.
"""

from __future__ import annotations

from time import time_ns
from typing import Any

import httpx

SECONDS = 5.0
"""So long a collector may take."""

SEVERITY = {"severityNumber": 9, "severityText": "INFO"}


class OtlpSink:
    """A collector's endpoint for logs, such as ``http://collector:4318/v1/logs``."""

    may_block = True

    def __init__(self, url: str) -> None:
        """Prepare; a collector that is not there is noticed with the first line."""
        self._url = url
        self._client = httpx.Client(timeout=SECONDS)

    def append(self, data: bytes) -> None:
        """See ``Sink``."""
        time = str(time_ns())
        records = [
            {"timeUnixNano": time, "body": {"stringValue": line}} | SEVERITY
            for line in data.decode().splitlines()
        ]
        self._post([_resource(records)])

    def require_reachable(self) -> None:
        """Send nothing, and see whether it is taken.

        Raises:
            OSError: if it is not.
        """
        self._post([])

    def sync(self) -> None:
        """See ``Sink``; what was taken is the collector's to keep."""

    def reopen(self) -> None:
        """See ``Sink``; each request finds its way anew."""

    def close(self) -> None:
        """See ``Sink``."""
        self._client.close()

    def _post(self, resources: list[dict[str, Any]]) -> None:
        try:
            answer = self._client.post(self._url, json={"resourceLogs": resources})
        except httpx.TimeoutException:
            raise TimeoutError(110, "the collector takes too long") from None
        except (httpx.HTTPError, httpx.InvalidURL):
            raise OSError(111, "the collector cannot be reached") from None
        if not answer.is_success:
            raise OSError(5, f"the collector answered {answer.status_code}")


def _resource(records: list[dict[str, Any]]) -> dict[str, Any]:
    name = {"key": "service.name", "value": {"stringValue": "latentguard"}}
    scope = {"scope": {"name": "latentguard.audit"}, "logRecords": records}
    return {"resource": {"attributes": [name]}, "scopeLogs": [scope]}
