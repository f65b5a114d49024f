"""The target model and those trained from it: found, checked, loaded, LoRAs applied, kept in the store.

`model.py` describes a model; `backbone.py` is the seam between the method and a family of models; `sd15.py` and
`sdxl.py` are families, with their configs in `sd15/` and `sdxl/`; `files.py` and `weight_files.py` read the files that
users have; `lora.py` writes and merges LoRAs; `published.py` keeps models in the store; `locations.py` records where
another worker finds one.
"""

from hgdpo_core.models.backbone import FAMILIES, Backbone, Conditioning, check_lora, load_backbone
from hgdpo_core.models.instantbooth import NAME as INSTANTBOOTH
from hgdpo_core.models.instantbooth import InstantBoothKind
from hgdpo_core.models.ip_adapter import NAME as IP_ADAPTER
from hgdpo_core.models.ip_adapter import IpAdapterKind
from hgdpo_core.models.model import Lora, Model, find_model, load_pipeline, recorded_syntax
from hgdpo_core.models.personaliser import PERSONALISERS
from hgdpo_core.models.sd15 import Sd15
from hgdpo_core.models.sdxl import Sdxl

FAMILIES["sd15"] = Sd15()
FAMILIES["sdxl"] = Sdxl()
PERSONALISERS[IP_ADAPTER] = IpAdapterKind()
PERSONALISERS[INSTANTBOOTH] = InstantBoothKind()

__all__ = ["FAMILIES", "Backbone", "Conditioning", "Lora", "Model", "check_lora", "find_model",
           "load_backbone", "load_pipeline", "recorded_syntax"]
