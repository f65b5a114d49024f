"""Failures of a store: transient ones are tried again, others explained in one line."""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hgdpo_core.errors import HGDPOError, StorageError, TransientStorageError

ATTEMPTS = 8
PATIENCE_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.4
LONGEST_PAUSE_SECONDS = 10.0
WARN_AFTER = 4

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_HOPELESS = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
# None: an error that gives no number. EREMOTEIO is how s3fs names a 500.
_HEALING_ERRNOS = {None} | {getattr(errno, name, errno.EIO) for name in (
    "EIO", "EREMOTEIO", "EBUSY", "EAGAIN", "EINTR", "ESTALE", "ENETUNREACH", "EHOSTUNREACH", "ENETDOWN")}
# By name, so that a local root never imports botocore, aiohttp or their like.
_HEALING_NAMES = {"ConnectionError", "HTTPClientError", "IncompleteReadError", "IncompleteRead",
                  "ResponseParserError", "ClientPayloadError", "ClientConnectionError"}
# A server that was never reached is more likely a wrong address than one that is about to come back.
_TLS = {"SSLError", "ClientSSLError"}
_NO_SERVER = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"}
_HEALING_CODES = {"SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch",
                  "OperationAborted", "TooManyRequests"}
_OWN_MISTAKES = (HGDPOError, TypeError, AttributeError, LookupError, AssertionError, MemoryError)

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_ADVICE = {
    "NoSuchBucket": "create the bucket or correct the root",
    "InvalidBucketName": "correct the bucket's name in the root",
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch"), f"correct {_KEYS}"),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
                    "the session is over: set new AWS credentials"),
    "RequestTimeTooSkewed": "set the clock of this machine",
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"),
                    "set AWS_DEFAULT_REGION to the bucket's region"),
}


class MissingKeyError(StorageError):
    """The object asked for is not in the store; its message names it."""


def attempt(doing: str, url: str, function: Callable[..., _T], *args: Any, answered: bool = True) -> _T:
    """`function(*args)`, again after growing pauses while its failures can heal.

    `doing` ("read", "write", ...) and `url` are for the message; `answered`: this store has answered before.
    MissingKeyError when there is no such object, TransientStorageError when its failures might heal but did not,
    StorageError for any other failure of the store.
    """
    started = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return function(*args)
        except _OWN_MISTAKES:
            raise
        except Exception as error:
            if not _can_heal(error) or (not answered and _names(error) & _NO_SERVER):
                raise _explained(doing, url, error) from error
            if tries == ATTEMPTS or time.monotonic() - started > PATIENCE_SECONDS:
                advice = f"gave up after {tries} tries; running again later can help"
                raise _explained(doing, url, error, advice) from error
            logger.log(logging.DEBUG if tries < WARN_AFTER else logging.WARNING,
                       "cannot %s %s yet (%s): try %d of %d follows", doing, url, _reason(error), tries + 1, ATTEMPTS)
        # Half of the pause is random, so that workers that failed together do not return together.
        time.sleep(min(FIRST_PAUSE_SECONDS * 2**(tries - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0))


def _can_heal(error: Exception) -> bool:
    names, source = _names(error), _s3_error(error)
    if names & _TLS:
        return False
    if source is not None:
        code = _code(source)
        status = source.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (408, 429) or (status >= 500 and status != 501):
            return True
        return code in _HEALING_CODES or "Throttl" in code
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, _HOPELESS) and error.errno in _HEALING_ERRNOS
    return bool(names & _HEALING_NAMES)


def _names(error: Exception) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _s3_error(error: BaseException | None) -> Any:
    """The botocore error behind `error`, which holds the server's answer; None for other failures."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return error
        error = error.__cause__
    return None


def _code(source: Any) -> str:
    return "" if source is None else str(source.response["Error"].get("Code"))


def _explained(doing: str, url: str, error: Exception, advice: str = "") -> StorageError:
    source = _s3_error(error)
    code = _code(source)
    operation = getattr(source, "operation_name", "")
    lost = isinstance(error, (FileNotFoundError, NotADirectoryError)) and code != "NoSuchBucket"
    # S3 answers a LIST of nothing with an empty list: 404 means that this is not S3.
    if lost and doing != "write" and not operation.startswith("List"):
        return MissingKeyError(f"{url} does not exist")
    kind = TransientStorageError if advice else StorageError
    return kind(f"cannot {doing} {url}: {_reason(error)}; {advice or _advice(error, code)}")


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300].rstrip(".:")


def _advice(error: Exception, code: str) -> str:
    number, names = getattr(error, "errno", None), _names(error)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    where = f"AWS_ENDPOINT_URL (now {endpoint})" if endpoint else "the network, or set AWS_ENDPOINT_URL"
    if code in _ADVICE:
        return _ADVICE[code]
    if names & _NO_SERVER:
        return f"no server answers there: correct {where}, or start the server"
    if names & _TLS:
        return f"correct http or https in {where}, or AWS_CA_BUNDLE for a certificate of your own"
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return "give this user (or these AWS credentials) the right to it, or choose another root"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space or choose another root"
    if isinstance(_s3_error(error), Exception) and (code.isdigit() or not code):      # not in S3's own words
        return f"it does not answer as S3 does: correct {where} or AWS_DEFAULT_REGION"
    if isinstance(error, (NotADirectoryError, FileExistsError, IsADirectoryError)):
        return "something else is in the way of that path: move it or choose another root"
    if "Credentials" in type(error).__name__:
        return f"set {_KEYS}"
    return f"running again will not help ({type(error).__name__}): correct the root or its server"
