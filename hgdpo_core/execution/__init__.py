"""Requests for ranges of shards (`jobs.py`), runners that make them (`runner.py`), quick imports (`imports.py`)."""
