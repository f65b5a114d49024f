"""What stages show: a bar in the terminal, progress and artifacts in the Prefect UI."""

import base64
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_logger
from tqdm import tqdm

from hgdpo_core.errors import HGDPOError
from hgdpo_core.progress import Progress

logger = get_logger("hgdpo.ui")

UPDATE_SECONDS = 5.0  # a call to the server costs more than many batches of a small model
MAX_DATA_URI_BYTES = 400_000


def _try(show: Callable[[], Any]) -> Any:
    """What the server answers; None where it is down or too busy: what the UI lacks must not cost the work."""
    try:
        return show()
    except (httpx.HTTPError, RuntimeError) as error:  # the second: Prefect's client, of a server it cannot reach
        logger.warning("the Prefect UI lacks an artifact, as the server did not take it (%s): the work goes on",
                       type(error).__name__)
        return None


def _client_call(name: str, *arguments: Any) -> None:
    with get_client(sync_client=True) as client:
        getattr(client, name)(*arguments)


def artifact_key(name: str) -> str:
    """A name in the form of Prefect's keys: `hps_v2.0 progress` becomes `hps-v2-0-progress`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def stage_progress(stage: str) -> Iterator[Progress]:
    """A callback for the core; the bar appears with the first piece of work, so not for a stage that exists."""
    bar: tqdm | None = None
    artifact: Any = None
    updated = 0.0

    def report(done: int, total: int, unit: str) -> None:
        nonlocal bar, artifact, updated
        if bar is None:
            bar = tqdm(total=total, desc=f"{stage:>10}", unit=f" {unit}", dynamic_ncols=True, mininterval=0.5)
            artifact = _try(lambda: create_progress_artifact(progress=0.0, key=artifact_key(f"{stage}-progress"),
                                                             description=f"{stage}: {total} {unit}"))
        bar.update(done - bar.n)
        if artifact is not None and (time.monotonic() - updated > UPDATE_SECONDS or done == total):
            _try(lambda: update_progress_artifact(artifact, progress=100.0 * done / max(total, 1)))
            updated = time.monotonic()

    try:
        yield report
        if artifact is not None:  # a full bar would only bury the results among a run's artifacts
            _try(lambda: _client_call("delete_artifact", artifact))
    finally:
        if bar is not None:
            bar.close()


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact of JSON values, as Prefect requires; fractions get four digits, for narrow columns."""
    table = [{name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
             for row in rows]
    _try(lambda: create_table_artifact(table=table, key=artifact_key(key), description=description))


def describe_row(row: Mapping[str, Any]) -> str:
    """A table's row as a line of the log: the first value, then the others by name."""
    (_, first), *others = row.items()
    return f"{first}: " + "; ".join(f"{name} {value}" for name, value in others)


class LiveTable:
    """One table artifact that follows the work, updated at most every few seconds."""

    def __init__(self, key: str, description: str):
        self._key, self._description = key, description
        self._id: Any = None
        self._shown: list[dict[str, Any]] = []
        self._shown_at = 0.0

    def show(self, rows: Sequence[Mapping[str, Any]], *, at_once: bool = False) -> None:
        """Show these rows, now or with a later call; unchanged ones cost nothing."""
        table = [dict(row) for row in rows]
        if table == self._shown or not (at_once or time.monotonic() - self._shown_at > UPDATE_SECONDS):
            return
        self._shown, self._shown_at = table, time.monotonic()
        if self._id is None:
            self._id = _try(lambda: create_table_artifact(table=table, key=artifact_key(self._key),
                                                          description=self._description))
            return
        _try(lambda: _client_call("update_artifact", self._id, ArtifactUpdate(data=json.dumps(table))))


def show_text(key: str, markdown: str, description: str) -> None:
    """A markdown artifact."""
    _try(lambda: create_markdown_artifact(markdown=markdown, key=artifact_key(key), description=description))


def show_image(key: str, image: Image.Image, description: str) -> None:
    """An artifact that shows an image, shrunk until it is small enough for the UI.

    As markdown: below an image artifact the UI prints its URL, which is the whole image, across the page.
    """
    image = image.convert("RGB")
    while True:
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=82)
        if buffer.tell() <= MAX_DATA_URI_BYTES:
            break
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    show_text(key, f"![{description}]({uri})", description)


class _OneLine(logging.Filter):
    """The messages of our own errors are complete: a traceback would only bury the line that says what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], HGDPOError):
            record.msg, record.args = str(record.exc_info[1]), ()
            record.exc_info = record.exc_text = None
        return True


def explain_own_errors() -> None:
    """Let Prefect's run loggers print an HGDPOError as its message instead of a traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, _OneLine) for f in logger.filters):
            logger.addFilter(_OneLine())
