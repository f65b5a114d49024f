"""What the commands have in common: the store, a progress bar, a flow that gets their opened inputs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hgdpo_core.progress import Progress

if TYPE_CHECKING:
    from prefect import Flow

    from hgdpo_core.storage import Store


def open_store(root: str | None) -> "Store":
    """The store of a root, by default the default root."""
    from hgdpo_core.storage import Store
    from hgdpo_core.storage.roots import default_root

    return Store(default_root() if root is None else root)


def call_opened(flow: "Flow[..., Any]", parameters: Mapping[str, Any], opener: Callable[..., Any],
                inputs: Mapping[str, Any], opened: Any) -> Any:
    """What the flow returns; it gets `opened`, which is `opener(**inputs)`, instead of opening it again."""
    from flows.server import call_flow
    from tasks.handover import handed_over

    with handed_over(opener, inputs, opened):
        return call_flow(flow, **parameters)


def plan_text(what: str, rows: Sequence[Mapping[str, Any]], data: Any = None) -> str:
    """A plan as a table, keys as its columns; or, where `data` is given, that as JSON for programs."""
    from hgdpo_core.rendering.tables import Table

    if data is not None:
        return json.dumps(data, indent=1)
    cells = [[_shown(value) for value in row.values()] for row in rows]
    table = Table([name.replace("_", " ") for name in rows[0]], cells).text() if rows else "Nothing to do"
    return f"Plan of {what} (nothing was made)\n\n{table}"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "?" if value is None else str(value)


@contextmanager
def terminal_bar(name: str) -> Iterator[Progress]:
    """A progress callback with a bar in the terminal."""
    from tqdm import tqdm

    with tqdm(desc=name, dynamic_ncols=True, mininterval=0.5, leave=False) as bar:
        def report(done: int, total: int, unit: str) -> None:
            bar.total, bar.unit = total, f" {unit}"
            bar.update(done - bar.n)

        yield report
