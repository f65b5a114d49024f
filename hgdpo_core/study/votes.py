"""What a study holds: pairs of images that are compared, and votes, as tables.

`studies/<id>/config.json` has the settings, `pairs.parquet` the pairs, `votes/` one file of votes a participant and
part. No row holds a name or an address.
"""

from typing import Literal

import pyarrow as pa

Choice = Literal["left", "right", "tie"]
Kind = Literal["question", "repeat", "check"]
"""A pair; one that this participant has seen before, with its sides swapped; a pair with an obvious answer."""

PAIRS = pa.schema([
    ("pair", pa.string()),  # unguessable, and says nothing about its models
    ("prompt_id", pa.string()), ("prompt", pa.string()),
    ("first", pa.string()), ("second", pa.string()),  # names of the models: target and tuned, or winner and loser
    ("first_image", pa.binary()), ("second_image", pa.binary()),
    ("first_scores", pa.map_(pa.string(), pa.float64())), ("second_scores", pa.map_(pa.string(), pa.float64())),
])
"""`..._scores`: by name of the judge, where the source has scores."""

VOTES = pa.schema([
    ("trial", pa.string()), ("pair", pa.string()), ("prompt_id", pa.string()),
    ("left", pa.string()), ("right", pa.string()),  # names of the models; of a check, "picture" and "noise"
    ("choice", pa.string()), ("kind", pa.string()),
    ("participant", pa.string()),  # a hash of the participant's code
    ("shown_at", pa.timestamp("us", tz="UTC")), ("ms", pa.int32()),
])
