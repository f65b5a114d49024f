"""Show the validation images of a training while it is running."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hgdpo_core.progress import Progress, StageProgress
from hgdpo_core.storage import Store
from hgdpo_core.training.request import TrainRequest, result_id
from hgdpo_core.training.validation import validation_grid, validation_steps
from tasks.ui import show_image, stage_progress

LOOK_SECONDS = 30.0


@contextmanager
def showing_validation(request: TrainRequest, progress: Progress) -> Iterator[Progress]:
    """`progress`, which also looks for new images now and then, and at the end, and shows them as an artifact."""
    if request.validation is None:
        yield progress
        return
    store = Store(request.root)
    model_id: str | None = None
    shown: list[int] = []
    looked = 0.0

    def look() -> None:
        nonlocal model_id, shown, looked
        looked = time.monotonic()
        model_id = model_id or result_id(request)  # once: it reads the manifest of every shard of latents
        steps = validation_steps(store, model_id) if model_id else []
        if model_id and steps != shown:
            shown = steps
            grid = validation_grid(store, model_id)
            assert grid is not None  # it has steps
            show_image(f"{request.kind}-validation", grid, f"{request.kind} in training, up to step {steps[-1]}")

    def report(done: int, total: int, unit: str) -> None:
        progress(done, total, unit)
        if time.monotonic() - looked > LOOK_SECONDS:
            look()

    yield report
    look()


@contextmanager
def training_progress(request: TrainRequest, on: StageProgress = stage_progress) -> Iterator[Progress]:
    """A training's bar and artifact, and the validation images that it generates on its way."""
    with on(request.kind.upper()) as bar, showing_validation(request, bar) as progress:
        yield progress
