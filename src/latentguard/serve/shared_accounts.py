"""Limits of clients, counted by Redis for several processes or replicas together.

One script counts and decides at once, so that two processes cannot both give the last place away.
Redis' own clock is used. A request that a killed process never ended stops counting after
``LEASE`` seconds. Without Redis nobody is served: limits that cannot be kept are not set aside.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from latentguard.serve.accounts import too_fast, too_many
from latentguard.serve.errors import Unavailable

log = logging.getLogger("latentguard.serve")

LEASE = 600
"""Seconds that a request counts at the most."""

SECONDS = 1.0
"""So long Redis may take to answer."""

PREFIX = "latentguard:limits:"

ADMIT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local lease, concurrency = tonumber(ARGV[2]), tonumber(ARGV[3])
local rate, burst = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= concurrency then return {'many', '0'} end
if rate > 0 then
  local kept = redis.call('HMGET', KEYS[2], 'left', 'since')
  local left = tonumber(kept[1] or burst) + (now - tonumber(kept[2] or now)) * rate
  left = math.min(left, burst)
  local allowed = left >= 1
  if allowed then left = left - 1 end
  redis.call('HSET', KEYS[2], 'left', string.format('%.6f', left))
  redis.call('HSET', KEYS[2], 'since', string.format('%.6f', now))
  redis.call('EXPIRE', KEYS[2], math.ceil(burst / rate) + 1)
  if not allowed then return {'fast', string.format('%.6f', (1 - left) / rate)} end
end
redis.call('ZADD', KEYS[1], string.format('%.6f', now + lease), ARGV[1])
redis.call('EXPIRE', KEYS[1], lease)
return {'admitted', '0'}
"""
"""Requests under way in a sorted set by when their lease ends; the rate as a bucket of requests."""


class SharedAccounts:
    """Limits of each account, counted by Redis."""

    def __init__(self, url: str, *, concurrency: int, rate: float | None, burst: int) -> None:
        """Prepare; nothing is reached yet.

        Args:
            url: As ``redis://host:6379/0``.
            concurrency: Requests of one account that may be under way.
            rate: Requests of one account in a second, in the long run; None for no limit.
            burst: Requests that may come at once after a pause.
        """
        self._redis = Redis.from_url(
            url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS, decode_responses=True
        )
        self._admit = self._redis.register_script(ADMIT)
        self._concurrency, self._rate, self._burst = concurrency, rate, burst

    @asynccontextmanager
    async def admit(self, account: str) -> AsyncIterator[None]:
        """See ``ClientLimits``; ``Unavailable`` if Redis cannot be reached."""
        name = hashlib.sha256(account.encode()).hexdigest()[:32]
        active = f"{PREFIX}{{{name}}}:active"  # braces: both keys on one node of a cluster
        lease = secrets.token_hex(12)
        limits = [LEASE, self._concurrency, self._rate or 0, self._burst]
        try:
            keys = [active, f"{PREFIX}{{{name}}}:rate"]
            decision, seconds = await self._admit(keys=keys, args=[lease, *limits])
        except (RedisError, OSError) as error:
            raise _unreachable(error) from None
        if decision == "many":
            raise too_many(self._concurrency)
        if decision == "fast":
            assert self._rate is not None
            raise too_fast(self._rate, float(seconds))
        try:
            yield
        finally:
            with suppress(RedisError, OSError):  # the lease ends by itself
                await self._redis.zrem(active, lease)

    async def require_reachable(self) -> None:
        """See ``ClientLimits``."""
        try:
            await self._redis.ping()
        except (RedisError, OSError) as error:
            raise _unreachable(error) from None

    async def close(self) -> None:
        """Close connections."""
        await self._redis.aclose()


def _unreachable(error: Exception) -> Unavailable:
    log.error("Redis cannot be reached: %s", type(error).__name__)
    return Unavailable("The limits of clients cannot be read.")
