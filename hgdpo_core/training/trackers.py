"""Training curves in TensorBoard, Weights & Biases and the other trackers that accelerate supports by name."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from hgdpo_core.config.training import TrackerName
from hgdpo_core.errors import ConfigError
from hgdpo_core.storage import Store, scratch_folder
from hgdpo_core.training.base import OnLog
from hgdpo_core.training.parts import LogRow

logger = logging.getLogger(__name__)

PROJECT = "hgdpo"
SEND_SECONDS = 60.0
PACKAGES = {"comet_ml": "comet-ml"}  # packages that are not named as the tracker


def check_tracker(name: TrackerName | None) -> None:
    """ConfigError, with what to install, when a tracker's package is not installed."""
    if name is not None and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ConfigError(f"tracker is {name}, but its package is not installed: pip install "
                          f"{PACKAGES.get(name, name)}, or set tracker to null")


@contextmanager
def tracked(name: TrackerName | None, store: Store, model_id: str, config: Mapping[str, Any]) -> Iterator[OnLog]:
    """A callback for log rows that also sends them to a tracker, as the run `model_id`.

    A resumed training continues its curve: rows come under their own step, and TensorBoard drops what an earlier
    attempt wrote from there on. TensorBoard's files are in `models/<model_id>/tensorboard/` of the store.
    """
    if name is None:
        yield lambda row: None
        return
    with (scratch_folder() as scratch,
          closing(_Curve(name, store, model_id, scratch / "tensorboard", config)) as curve):
        yield curve


class _Curve:
    """A tracker, opened with the first row: only then is it clear from which step the training continues."""

    def __init__(self, name: TrackerName, store: Store, model_id: str, scratch: Path, config: Mapping[str, Any]):
        self._name, self._store, self._model_id, self._config = name, store, model_id, config
        self._key = f"models/{model_id}/tensorboard"
        local = store.local_path(self._key)
        self._folder, self._is_copied = local or scratch, local is None and name == "tensorboard"
        self._tracker: Any = None
        self._sent_at = time.monotonic()

    def __call__(self, row: LogRow) -> None:
        if self._tracker is None:
            self._tracker = self._open(row["step"])
        self._tracker.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
        if time.monotonic() - self._sent_at > SEND_SECONDS:
            self._send()

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()
            self._send()

    def _send(self) -> None:
        """TensorBoard writes to a disk; a store elsewhere gets a copy of its files now and then."""
        self._sent_at = time.monotonic()
        if self._is_copied:
            self._store.put_folder(self._folder, self._key)

    def _open(self, step: int) -> Any:
        kind: Any = LOGGER_TYPE_TO_CLASS[self._name]
        if self._name == "tensorboard":
            logger.info("training curves: tensorboard --logdir %s",
                        self._store.url(self._key) if self._is_copied else self._folder)
            tracker = kind(self._folder.name, logging_dir=self._folder.parent, purge_step=step)
        elif self._name == "wandb":
            tracker = kind(PROJECT, id=self._model_id, name=self._model_id, resume="allow", config=dict(self._config))
        else:
            tracker = kind(self._model_id)  # aim, dvclive and the like write into the current folder
        tracker.start()
        return tracker
