"""Prompts: `sources.py` reads them from files and data sets, `lists.py` checks, numbers and keeps them, `syntax.py`
reads AUTOMATIC1111's weights.
"""

from hgdpo_core.prompts.lists import (
    PromptList,
    clean_prompts,
    image_seed,
    load_prompts,
    prompt_id,
    read_prompts,
    save_prompts,
)

__all__ = ["PromptList", "clean_prompts", "image_seed", "load_prompts", "prompt_id", "read_prompts", "save_prompts"]
