"""Which errors a stage's task retries, and how our own errors are logged."""

import asyncio
import logging

import pytest
from prefect.states import exception_to_failed_state

from hgdpo_core.errors import ConfigError, CorruptShardError, InputError, StorageError, TransientStorageError
from tasks.options import can_heal
from tasks.ui import explain_own_errors


@pytest.mark.parametrize(("error", "again"), [
    (TransientStorageError("the bucket answered 503"), True), (StorageError("no credentials"), False),
    (InputError("no prompt"), False), (ConfigError("beta"), False),
    (CorruptShardError("moved to quarantine"), False), (RuntimeError("a bug"), False)])
def test_only_storage_is_tried_again(error, again):
    async def ask():
        return await can_heal(None, None, await exception_to_failed_state(error))

    assert asyncio.run(ask()) is again


class Keep(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_our_errors_are_logged_as_their_message_and_others_keep_their_traceback():
    explain_own_errors()
    logger, kept = logging.getLogger("prefect.flow_runs"), Keep()
    logger.addHandler(kept)
    try:
        for error in (InputError("no prompt: add one"), RuntimeError("a bug")):
            try:
                raise error
            except (InputError, RuntimeError):
                logger.exception("Encountered an exception during execution")
    finally:
        logger.removeHandler(kept)
    ours, theirs = kept.records
    assert ours.getMessage() == "no prompt: add one" and ours.exc_info is None
    assert theirs.getMessage().startswith("Encountered") and theirs.exc_info is not None
