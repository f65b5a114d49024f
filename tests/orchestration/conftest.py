"""One temporary Prefect server for all tests of flows: it takes 13 seconds to start, on a busy machine minutes."""

import pytest
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session")
def server():
    with prefect_test_harness(server_startup_timeout=600):
        yield
