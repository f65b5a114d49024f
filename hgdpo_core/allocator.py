"""How processes that compute take GPU memory. Imports nothing: it is set before torch is imported."""

from collections.abc import Mapping


def with_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which GPU memory is not lost in pieces too small for a batch.

    What the user has set stays; the second name is the one before torch 2.9, which torch still reads.
    """
    if "PYTORCH_ALLOC_CONF" in environment or "PYTORCH_CUDA_ALLOC_CONF" in environment:
        return dict(environment)
    return {**environment, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
