"""Roots and connections: what a root names, the secrets it must not hold, and the file system behind it."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import fsspec

from hgdpo_core.errors import ConfigError

PARALLEL_REQUESTS = 32
S3_PROTOCOLS = ("s3", "s3a")
HUB_PROTOCOL = "hf"
HUB_BLOCK_BYTES = 2**14
CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0      # without a byte, from the moment all of the request is sent

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


class Root(NamedTuple):
    """The location of a store: its URL, the protocol ("file" for a local folder), the path inside its file system."""

    url: str
    protocol: str
    base: str


def default_root() -> str:
    """$HGDPO_ROOT, else `output/full` in the current folder."""
    return os.environ.get("HGDPO_ROOT") or "output/full"


def parse_root(text: str) -> Root:
    """The root that a path or an fsspec URL names. ConfigError for one that holds a secret or makes no sense."""
    scheme = _SCHEME.match(text)
    protocol = scheme[1].lower() if scheme else "file"
    rest = text[scheme.end():] if scheme else text
    if protocol in ("file", "local"):
        folder = _local_folder(local_address(text))
        return Root(f"file://{folder}", "file", folder)
    _refuse_secret(text, "root")
    if protocol in S3_PROTOCOLS:
        _endpoint()
    # S3 would take `bucket//prefix` for another key, which is written and read, but never listed.
    url = f"{protocol}://{re.sub('//+', '/', rest).strip('/')}"
    if url.endswith("://"):
        raise ConfigError(f"root {url!r} names no bucket: expected {url}<bucket>/<folder>")
    return Root(url, protocol, _filesystem_class(protocol)._strip_protocol(url).rstrip("/"))


def local_address(text: str) -> str:
    """The path in a path or a file URL; ConfigError for `file://data/x`, in which data is a host and not a folder."""
    scheme = _SCHEME.match(text)
    rest = text[scheme.end():] if scheme else text
    if scheme and rest and not rest.startswith("/"):
        raise ConfigError(f"{text} names the host {rest.partition('/')[0]}, not a folder: write file:///{rest} for a "
                          f"path from the top, or {rest} for one from here")
    return rest


def connect(protocol: str) -> Any:
    """A new file system of this protocol that shares nothing with others and caches no listings."""
    if protocol not in S3_PROTOCOLS:
        # the hub's would fetch 5 MB beyond each range that is asked for
        options = {"block_size": HUB_BLOCK_BYTES} if protocol == HUB_PROTOCOL else {}
        return _filesystem_class(protocol)(skip_instance_cache=True, use_listings_cache=False, **options)
    endpoint = _endpoint()
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS,
        "max_pool_connections": PARALLEL_REQUESTS,
        "retries": {"mode": "standard", "total_max_attempts": 4},
        # Servers that are not AWS refuse or garble the newer trailing checksums.
        "request_checksum_calculation": "when_required", "response_checksum_validation": "when_required",
    }
    if endpoint and not (urlsplit(endpoint).hostname or "").endswith("amazonaws.com"):
        config["s3"] = {"addressing_style": "path"}
    # The empty values keep a user's fsspec configuration from slipping other credentials or endpoints in.
    filesystem = _filesystem_class("s3")(
        anon=False, key=None, secret=None, token=None, username=None, password=None, endpoint_url=endpoint,
        client_kwargs={}, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
    filesystem.retries = 1      # botocore retries requests and Store operations: a third layer multiplies
    if "s3" in config:
        # Redirected, botocore asks for the bucket's region, is redirected again, and so on a hundred times.
        filesystem.connect().meta.events.register("before-call.s3.HeadBucket", _no_region)
    return filesystem


def _no_region(**_: Any) -> tuple[Any, dict[str, Any]]:
    return SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": {}}}


def _local_folder(text: str) -> str:
    if not text:
        raise ConfigError("the root is empty: expected a folder or a URL such as s3://<bucket>/<folder>")
    if "::" in text and "://" in text:
        raise ConfigError("the root is a chain of file systems: expected one, since a cache hides new shards")
    return Path(os.path.abspath(os.path.expanduser(text))).as_posix()


def _refuse_secret(url: str, what: str) -> None:
    address, mark, _ = unquote(_SCHEME.sub("", url, count=1)).partition("?")
    user, at, _ = address.rpartition("@")
    if mark or (at and ":" in user) or (url.lower().startswith("s3") and "@" in address.partition("/")[0]):
        # Never quote it here: this message is logged.
        raise ConfigError(f"the {what} holds a user, password or query, which would end up in logs: give the "
                          f"{what} without it and the credentials in the environment (AWS_ACCESS_KEY_ID, "
                          "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE)")


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        _refuse_secret(endpoint, "endpoint (AWS_ENDPOINT_URL)")
    return endpoint


def _filesystem_class(protocol: str) -> Any:
    try:
        return fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"a root of the kind {protocol}:// cannot be opened: {error}") from None
