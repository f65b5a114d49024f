"""The target and what came of it: found, checked, loaded, worn LoRAs, kept in the store.

`model.py` is what the others hold; `files.py` and `weight_files.py` read what people have on their disks, with the
configs in `sd15/`; `lora.py` writes and merges LoRAs; `published.py` keeps models in the store; `places.py` says where
a worker elsewhere finds one.
"""

from hgdpo_core.models.model import (
    DTYPES,
    Lora,
    Model,
    cpu_has_fast_bfloat16,
    default_device,
    device_name,
    find_model,
    load_pipeline,
    recorded_syntax,
    resolve_dtype,
)

__all__ = ["DTYPES", "Lora", "Model", "cpu_has_fast_bfloat16", "default_device", "device_name", "find_model",
           "load_pipeline", "recorded_syntax", "resolve_dtype"]
