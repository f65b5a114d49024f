"""The user's captioned images for SFT.

`sets.py` is any such set; `folders.py`, `tars.py` and `tables.py` read the three forms; `captions.py` writes captions
where there are none, by the LLaVA of `llava.py`.
"""

from hgdpo_core.image_sets.sets import ImageSet, expand_braces, locate_images, open_located_images, read_image_set

__all__ = ["ImageSet", "expand_braces", "locate_images", "open_located_images", "read_image_set"]
