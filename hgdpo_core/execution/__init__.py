"""Work cut into ranges of shards (`jobs.py`), who makes it (`runner.py`), quick imports for it (`imports.py`)."""
