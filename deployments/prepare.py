"""What a server needs before `prefect deploy --all`, which refuses a work pool that does not exist.

    python -m deployments.prepare [--type process | kubernetes] [--base-job-template FILE]

creates the work pools and the automations on the server that PREFECT_API_URL names. What exists stays; a template that
is given replaces that of an existing pool of the same type. Its variable `gpus` starts at 0 in the pool of parents.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists

from deployments.automations import ship
from deployments.pools import PARENTS, POOLS


def create_pools(kind: str = "process", template: dict[str, Any] | None = None) -> None:
    """Create the work pools that are missing, of this type of Prefect's, with this base job template or its own."""
    with get_client(sync_client=True) as client:
        for pool in POOLS:
            own = copy.deepcopy(template or {})
            if pool == PARENTS and "gpus" in own.get("variables", {}).get("properties", {}):
                own["variables"]["properties"]["gpus"]["default"] = 0
            try:
                client.create_work_pool(WorkPoolCreate(name=pool.name, type=kind, description=pool.description,
                                                       concurrency_limit=pool.limit, base_job_template=own))
            except ObjectAlreadyExists:
                existing = client.read_work_pool(pool.name)
                if existing.type != kind:
                    raise SystemExit(f"error: the work pool {pool.name} exists as {existing.type}, not {kind}: delete "
                                     f"it (prefect work-pool delete {pool.name}) or ask for its type") from None
                if template:
                    client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=own))


def main(arguments: Sequence[str] | None = None) -> None:
    """Create pools and automations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--type", default="process", help="of the work pools: process, kubernetes; default process")
    parser.add_argument("--base-job-template", type=Path, help="a JSON file, such as kubernetes.json")
    options = parser.parse_args(arguments)
    template = json.loads(options.base_job_template.read_text()) if options.base_job_template else None
    create_pools(options.type, template)
    ship()


if __name__ == "__main__":
    main()
