"""A store for plans: reads what is there, writes nothing."""

from pathlib import Path

from hgdpo_core.storage.store import Store


class DryStore(Store):
    """Reads as its root's store does; every write, move and removal does nothing, without a message.

    So what a run would make can be planned by the code that makes it, up to the first thing that does not exist.
    """

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return DryStore, (self.root,)

    def write_bytes(self, key: str, data: bytes) -> None:
        pass

    def delete(self, key: str) -> None:
        pass

    def move(self, key: str, new_key: str) -> None:
        pass

    def put_folder(self, local: Path, key: str) -> None:
        pass

    def abort_upload(self, key: str, upload_id: str) -> None:
        pass
