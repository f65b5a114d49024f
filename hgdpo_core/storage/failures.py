"""What went wrong: trying again what can heal, and one line of explanation for what cannot."""

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hgdpo_core.errors import HGDPOError, StorageError

ATTEMPTS = 8
PATIENCE_SECONDS = 120.0

_T = TypeVar("_T")
_HOPELESS = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
# None: an error that gives no number. EREMOTEIO is how s3fs names a 500.
_HEALING_ERRNOS = {None} | {getattr(errno, name, errno.EIO) for name in (
    "EIO", "EREMOTEIO", "EBUSY", "EAGAIN", "EINTR", "ESTALE", "ENETUNREACH", "EHOSTUNREACH", "ENETDOWN")}
# By name, so that a local root never imports botocore, aiohttp or their like.
_HEALING_NAMES = {"ConnectionError", "HTTPClientError", "IncompleteReadError", "IncompleteRead",
                  "ResponseParserError", "ClientPayloadError", "ClientConnectionError"}
_HEALING_CODES = {"SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch",
                  "OperationAborted", "TooManyRequests"}
_MISTAKES_OF_OURS = (HGDPOError, TypeError, AttributeError, LookupError, AssertionError, MemoryError)


class MissingKeyError(StorageError):
    """The object asked for is not in the store; its message names it."""


def attempt(doing: str, url: str, function: Callable[..., _T], *args: Any) -> _T:
    """`function(*args)`, again after growing pauses while its failures can heal.

    `doing` ("read", "write", ...) and `url` are for the message. MissingKeyError when there is no such object,
    StorageError for any other failure of the store.
    """
    started = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return function(*args)
        except _MISTAKES_OF_OURS:
            raise
        except Exception as error:
            if not _can_heal(error):
                raise _explained(doing, url, error) from error
            if tries == ATTEMPTS or time.monotonic() - started > PATIENCE_SECONDS:
                advice = f"gave up after {tries} tries; running again later can help"
                raise _explained(doing, url, error, advice) from error
        # Half of the pause is chance, so that workers that failed together do not come back together.
        time.sleep(min(0.2 * 2**tries, 10.0) * random.uniform(0.5, 1.0))


def _can_heal(error: Exception) -> bool:
    response = _s3_response(error)
    if response is not None:
        code = str(response["Error"].get("Code"))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (408, 429) or (status >= 500 and status != 501):
            return True
        return code in _HEALING_CODES or "Throttl" in code
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, _HOPELESS) and error.errno in _HEALING_ERRNOS
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & _HEALING_NAMES) and "SSLError" not in names


def _s3_response(error: BaseException | None) -> dict[str, Any] | None:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return response
        error = error.__cause__
    return None


def _explained(doing: str, url: str, error: Exception, advice: str = "") -> StorageError:
    response = _s3_response(error)
    code = str(response["Error"].get("Code")) if response is not None else ""
    lost = isinstance(error, (FileNotFoundError, NotADirectoryError)) and code != "NoSuchBucket"
    if lost and doing != "write":
        return MissingKeyError(f"{url} does not exist")
    reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300]
    return StorageError(f"cannot {doing} {url}: {reason.rstrip('.')}; {advice or _advice(error, code)}")


def _advice(error: Exception, code: str) -> str:
    number = getattr(error, "errno", None)
    if code == "NoSuchBucket":
        return "create the bucket or correct the root"
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return "give this user (or these AWS credentials) the right to it, or choose another root"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space or choose another root"
    if isinstance(error, (NotADirectoryError, FileExistsError, IsADirectoryError)):
        return "something else is in the way of that path: move it or choose another root"
    if "Credentials" in type(error).__name__:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return f"running again will not help ({type(error).__name__}): correct the root or its server"
