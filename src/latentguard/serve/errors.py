"""What goes wrong with a request: one exception for each answer that is not a verdict."""

from __future__ import annotations

import traceback


class ApiError(Exception):
    """Ends a request with an error in OpenAI's form."""

    status, kind, code = 500, "server_error", "internal_error"
    retry: int | None = None
    """Seconds after which the client may try again."""

    @property
    def is_clients_doing(self) -> bool:
        """Whether the request is refused for what it is; one that its client left is not."""
        return 400 <= self.status < 500 and self.status != ClientDisconnected.status

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        message = str(self).encode("utf-8", "replace").decode()  # it may quote half a character
        error = {"message": message, "type": self.kind, "param": None, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, where that makes sense."""
        return {} if self.retry is None else {"retry-after": str(self.retry)}


class BadRequest(ApiError):
    """The request cannot be understood, or asks for what is not there."""

    status, kind, code = 400, "invalid_request_error", "invalid_request"


class Unauthorized(ApiError):
    """There is no key, or a wrong one."""

    status, kind, code = 401, "authentication_error", "invalid_api_key"


class NotJudged(ApiError):
    """Nothing says that this may go on."""

    status, kind, code = 403, "permission_error", "not_judged"


class Flagged(ApiError):
    """The guard flagged the chat."""

    status, kind, code = 403, "permission_error", "content_filter"


class RequestTimeout(ApiError):
    """The body did not come in time."""

    status, kind, code = 408, "invalid_request_error", "request_timeout"


class ClientDisconnected(ApiError):
    """The client has left: nobody reads this, but the audit log notes it."""

    status, kind, code = 499, "invalid_request_error", "client_left"


class PayloadTooLarge(ApiError):
    """The body or the prompt is too long."""

    status, kind, code = 413, "invalid_request_error", "too_large"


class QueueFull(ApiError):
    """The queue is full."""

    status, kind, code, retry = 429, "rate_limit_error", "queue_full", 1


class RateLimited(ApiError):
    """One client asks too often."""

    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, reason: str, seconds: int) -> None:
        """Say why, and after how many seconds there is room."""
        super().__init__(reason)
        self.retry = seconds


class Unavailable(ApiError):
    """The guard cannot judge now: it is loading, draining, or its thread crashed."""

    status, kind, code, retry = 503, "server_error", "unavailable", 1


class AuditUnavailable(Unavailable):
    """The audit log cannot be written."""

    code = "audit_log"


class UpstreamError(ApiError):
    """The upstream service cannot be reached or failed."""

    status, kind, code = 502, "server_error", "upstream_error"


class ReloadFailed(ApiError):
    """Guards and keys could not be replaced; the old ones go on."""

    status, kind, code = 409, "invalid_request_error", "reload_failed"


class NotSwapped(ApiError):
    """The guard that decides and its shadow keep their roles."""

    status, kind, code = 409, "invalid_request_error", "roles_kept"


def error_location(error: BaseException) -> str:
    """What kind of error it is and where it arose, for the log; its words may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(
        [type(error).__name__, *(f"{f.name} ({f.filename}:{f.lineno})" for f in frames[::-1])]
    )
