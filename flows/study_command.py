"""`hgdpo study create` and `hgdpo study serve`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from flows.study_results_command import study_forget, study_results
from flows.terminal import open_store, terminal_bar


def create(options: argparse.Namespace) -> int:
    """Make a study of a finished run, an evaluation or triplets: pairs of images, and who sees which."""
    from flows.parameters import STUDY_CREATE, values_of
    from hgdpo_core.config.base import validate
    from hgdpo_core.config.study import StudyConfig
    from hgdpo_core.study.create import create_study

    settings = values_of(options, [parameter for parameter in STUDY_CREATE if parameter.name != "root"])
    config = validate(StudyConfig, {**settings, "sources": tuple(settings["sources"])})
    with terminal_bar("pairs") as progress:
        created = create_study(open_store(options.root), config, progress)
    print(created.sentence)
    for reason, number in sorted(created.refused.items()):
        print(f"Refused: {number:,}: {reason}")
    print(f"Next: {created.study.serve_command}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve the page of a study, until Ctrl-C; on this machine alone unless --host says otherwise."""
    from hgdpo_core.study.server import serve_study
    from hgdpo_core.study.study import log_folder, open_study

    study = open_study(open_store(options.root), options.study)
    log = Path(options.log) if options.log else log_folder(study)

    def announce(url: str) -> None:
        print(f"Study {study.id}: {url}", flush=True)
        print(f"Answers are kept in {log} until they are in {study.store.url(study.key)}/votes; Ctrl-C ends",
              flush=True)

    try:
        serve_study(study, log, host=options.host, port=options.port, access_code=options.access_code,
                    on_start=announce)
    except KeyboardInterrupt:
        print("\nEnded; all answers are stored, the same command goes on")
    return 0


STUDY_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "create": create, "serve": serve, "results": study_results, "forget": study_forget}
