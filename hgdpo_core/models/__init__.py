"""The target and what came of it: found, checked, loaded, LoRAs applied, kept in the store.

`model.py` is what the others hold; `backbone.py` is the seam between the method and a family of models, and `sd15.py` a
family, with its configs in `sd15/`; `files.py` and `weight_files.py` read what people have on their disks; `lora.py`
writes and merges LoRAs; `published.py` keeps models in the store; `places.py` says where a worker elsewhere finds one.
"""

from hgdpo_core.models.backbone import FAMILIES, Backbone, Conditioning, load_backbone
from hgdpo_core.models.model import Lora, Model, check_lora, find_model, load_pipeline, recorded_syntax
from hgdpo_core.models.sd15 import Sd15

FAMILIES["sd15"] = Sd15()

__all__ = ["FAMILIES", "Backbone", "Conditioning", "Lora", "Model", "check_lora", "find_model",
           "load_backbone", "load_pipeline", "recorded_syntax"]
