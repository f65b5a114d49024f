"""Prompts: `sources.py` reads them from files and data sets, `lists.py` checks, numbers and keeps them, `syntax.py`
reads AUTOMATIC1111's weights, `samples.py` joins a prompt and a person.
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
from hgdpo_core.prompts.samples import PERSON, Sample, as_sample, caption_of, concept_of

__all__ = ["PERSON", "PromptList", "Sample", "as_sample", "caption_of", "clean_prompts", "concept_of", "image_seed",
           "load_prompts", "prompt_id", "read_prompts", "save_prompts"]
