"""One thin Prefect task per stage: log, show progress, make artifacts, call one core function."""
