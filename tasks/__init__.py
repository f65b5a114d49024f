"""One thin Prefect task a stage: log, show progress, make artifacts, call one core function."""
