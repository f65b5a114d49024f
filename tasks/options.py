"""The options of every stage's task."""

from typing import Any

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


STAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,  # the store has what is finished; a second record could only disagree
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": can_heal,
}
