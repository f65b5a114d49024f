"""What the server takes of a request: hosts, origins, sizes, rates."""

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from hgdpo_core.config.base import describe

BODY_BYTES = 4096
BODY_SECONDS = 10.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

BodyT = TypeVar("BodyT", bound=BaseModel)


class RefusedRequestError(Exception):
    """The answer is this status, with this message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class RateLimit:
    """So many requests per second for each name, and a burst of them at once. Idle names are forgotten."""

    per_second: float
    burst: int
    clock: Callable[[], float] = time.monotonic
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> requests left, and when that was."""

    def take(self, name: str) -> None:
        """RefusedRequestError (429) where the name has none left."""
        now = self.clock()
        left, since = self._left.get(name, (float(self.burst), now))
        left = min(float(self.burst), left + (now - since) * self.per_second)
        if left < 1:
            raise RefusedRequestError(429, "too many requests: wait a few seconds")
        self._left[name] = left - 1, now
        if len(self._left) > 10_000:
            full_again = self.burst / self.per_second
            self._left = {key: value for key, value in self._left.items() if now - value[1] < full_again}


def check_host(request: Request, loopback_only: bool) -> None:
    """RefusedRequestError where a server of this machine alone is addressed by another name: DNS was rebound."""
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    if loopback_only and host not in LOOPBACK:
        raise RefusedRequestError(400, "this address is not served here: open the link that the server printed")


def check_origin(request: Request) -> None:
    """RefusedRequestError for a request that a page of another site makes, or that names no page."""
    origin = urlsplit(request.headers.get("origin", ""))
    if origin.scheme not in ("http", "https") or origin.netloc != request.headers.get("host"):
        raise RefusedRequestError(403, "expected a request from the study's own page")


def same_text(given: str, expected: str) -> bool:
    """Compares without telling by the time it takes how much is right."""
    return hmac.compare_digest(given.encode(), expected.encode())


async def read_body(request: Request, kind: type[BodyT]) -> BodyT:
    """The JSON body of a request; RefusedRequestError for one that is too large, slow, or of another form."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedRequestError(415, "expected application/json")
    data = await _read(request)
    try:
        return kind.model_validate(json.loads(data, parse_constant=_refuse_constant), strict=True)
    except ValidationError as error:
        raise RefusedRequestError(422, describe(error)[:300]) from None
    except (ValueError, RecursionError):
        raise RefusedRequestError(400, "expected a JSON object") from None


async def _read(request: Request) -> bytes:
    size = request.headers.get("content-length", "0")
    if not size.isdecimal() or int(size) > BODY_BYTES:
        raise RefusedRequestError(413, f"expected at most {BODY_BYTES} bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():  # a body in chunks has no length
                data += chunk
                if len(data) > BODY_BYTES:
                    raise RefusedRequestError(413, f"expected at most {BODY_BYTES} bytes")
    except TimeoutError:
        raise RefusedRequestError(408, "the request took too long") from None
    except ClientDisconnect:
        raise RefusedRequestError(400, "the request was not finished") from None
    return bytes(data)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
