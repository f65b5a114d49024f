"""Text embeddings, once per prompt: all images of a prompt use the same, also across batches."""

from collections.abc import Callable, Sequence

import torch

MAX_PROMPTS = 4096


class TextCache:
    """Rows of `embed(prompts)`, kept by prompt; the oldest go when there are more than `MAX_PROMPTS`."""

    def __init__(self, embed: Callable[[Sequence[str]], torch.Tensor]):
        self.embed = embed
        self.rows: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, D] for B prompts, in their order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]
        if new:
            self.rows |= zip(new, self.embed(new), strict=True)
        rows = torch.stack([self.rows[prompt] for prompt in prompts])
        for prompt in list(self.rows)[:max(0, len(self.rows) - MAX_PROMPTS)]:
            del self.rows[prompt]
        return rows
