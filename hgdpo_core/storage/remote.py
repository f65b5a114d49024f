"""Objects behind an fsspec file system, most often S3."""

import hashlib
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.asyn import sync

from hgdpo_core.storage.keys import Entries, Tree, checked
from hgdpo_core.storage.roots import S3_PROTOCOLS, connect

PARALLEL_CHUNKS = 4

_MD5 = re.compile("[0-9a-f]{32}")

# A file system made before a fork shares its sockets with the parent: the child neither uses nor closes it.
_inherited: list[Any] = []


class RemoteObjects:
    """The requests of a Store, each carried out once below `base`. Connects on first use, and again after a fork."""

    def __init__(self, protocol: str, base: str):
        self._protocol, self._base = protocol, base
        self.is_s3 = protocol in S3_PROTOCOLS
        self._filesystem: Any = None
        self._owner_pid = 0

    @property
    def filesystem(self) -> Any:
        """The connection of this process."""
        if self._owner_pid != os.getpid():
            _inherited.append(self._filesystem)
            self._filesystem, self._owner_pid = connect(self._protocol), os.getpid()
        return self._filesystem

    def size(self, key: str) -> int | None:
        info = self.filesystem.info(self._path(key))
        return None if info["type"] == "directory" else info["size"]

    def head(self, key: str) -> int | None:
        """The size, without the listing by which s3fs looks for a folder where there is no object."""
        if not self.is_s3:
            return self.size(key)
        return self._call("head_object", key)["ContentLength"]

    def read(self, key: str) -> bytes:
        """The whole object, on S3 checked against its ETag where that is an MD5; ConnectionError for other bytes."""
        if not self.is_s3:
            return self.filesystem.cat_file(self._path(key))
        data, tag = self._get(key)
        differs = _MD5.fullmatch(tag) and hashlib.md5(data, usedforsecurity=False).hexdigest() != tag
        # Not every server's ETag is an MD5: the same bytes twice are what it holds, unless both were cut short.
        if differs and (self._get(key) != (data, tag) or self.size(key) != len(data)):
            raise ConnectionError(f"expected the bytes of ETag {tag}, got others")
        return data

    def _get(self, key: str) -> tuple[bytes, str]:
        """Bytes and ETag; no ETag where AWS encrypts with a key of its own, for that one is never an MD5."""
        filesystem = self.filesystem
        bucket, name, _ = filesystem.split_path(self._path(key))

        async def get() -> tuple[bytes, str]:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=name)
            async with answer["Body"] as body:
                data = await body.read()
            encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
            return data, "" if encrypted else answer.get("ETag", "").strip('"')

        result: Any = sync(filesystem.loop, get)
        return result

    def read_range(self, key: str, start: int, end: int) -> bytes:
        return self.filesystem.cat_file(self._path(key), start=start, end=end)

    def write(self, key: str, data: bytes) -> None:
        self._make_parent(key)
        # in one request on S3: the Store cuts large objects into parts
        whole = {"chunksize": len(data) + 1} if self.is_s3 else {}
        self.filesystem.pipe_file(self._path(key), data, **whole)

    def put_file(self, source: Path, key: str) -> None:
        """For stores without uploads in parts; a file for S3 is sent by the Store."""
        self._make_parent(key)
        self.filesystem.put_file(str(source), self._path(key))

    def delete(self, key: str) -> None:
        self.filesystem.rm_file(self._path(key))

    def copy(self, key: str, new_key: str) -> None:
        self._make_parent(new_key)
        self.filesystem.cp_file(self._path(key), self._path(new_key))

    def entries(self, folder: str) -> Entries:
        base = self._path(folder) + "/"
        infos = ((info["name"], info) for info in self.filesystem.ls(base[:-1], detail=True))
        return [(name[len(base):].rstrip("/"), info["type"] == "directory", info["size"])
                for name, info in infos if name.startswith(base) and name != base]

    def walk(self, folder: str) -> Tree:
        base = self._path(folder) + "/"
        return [(path[len(base):], info["size"], _changed_at(info))
                for path, info in self.filesystem.find(base[:-1], detail=True).items()
                if path.startswith(base) and not path.endswith("/")]

    def list_uploads(self, marker: dict[str, str]) -> tuple[list[tuple[str, str, float]], dict[str, str] | None]:
        """One page of (key, upload id, start) of unfinished S3 uploads; the next page's marker, None for the last."""
        bucket, inside, _ = self.filesystem.split_path(self._base)
        prefix = f"{inside}/" if inside else ""
        page = self.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        uploads = [(upload["Key"][len(prefix):], upload["UploadId"], upload["Initiated"].timestamp())
                   for upload in page.get("Uploads", [])]
        if not page.get("IsTruncated"):
            return uploads, None
        return uploads, {name: page["Next" + name] for name in ("KeyMarker", "UploadIdMarker")
                         if page.get("Next" + name)}

    def start_upload(self, key: str) -> str:
        return self._call("create_multipart_upload", key)["UploadId"]

    def send_part(self, key: str, upload_id: str, number: int, data: bytes) -> dict[str, Any]:
        answer = self._call("upload_part", key, UploadId=upload_id, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def finish_upload(self, key: str, upload_id: str, parts: list[dict[str, Any]]) -> None:
        self._call("complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": parts})

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._call("abort_multipart_upload", key, UploadId=upload_id)

    def _call(self, request: str, key: str, **arguments: Any) -> dict[str, Any]:
        bucket, name, _ = self.filesystem.split_path(self._path(key))
        return self.filesystem.call_s3(request, Bucket=bucket, Key=name, **arguments)

    def _path(self, key: str) -> str:
        return f"{self._base}/{checked(key)}".rstrip("/")

    def _make_parent(self, key: str) -> None:
        # s3fs and gcsfs would try to create the bucket, and neither needs it
        if self._protocol not in (*S3_PROTOCOLS, "gs", "gcs", "abfs", "az"):
            self.filesystem.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)


def _changed_at(info: dict[str, Any]) -> float:
    for name in ("LastModified", "mtime", "modified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()              # unknown counts as new, so that no clean-up removes it as old
