"""The options of every stage's task."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from hgdpo_core.errors import TransientStorageError


async def can_heal(task: Any, run: Any, state: Any) -> bool:
    """Retry only what may pass: a store or network that gave no answer. What needs the user fails at once.

    So does a broken shard: it was moved to quarantine, and the stage that makes it comes earlier in the run.
    """
    try:
        await state.aresult()
    except TransientStorageError:
        return True
    except BaseException:
        return False
    return False


P = ParamSpec("P")
R = TypeVar("R")


def stage_task(name: str, run_name: str = "") -> Callable[[Callable[P, R]], Task[P, R]]:
    """A stage as a task; `run_name` may hold parameters in braces, by default it is the name without a random end."""
    return task(name=name, task_run_name=run_name or name,
                cache_policy=NO_CACHE,  # the store has what is finished; a second record could only disagree
                retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=can_heal)
