"""`hgdpo caption`."""

import argparse

from flows.terminal import terminal_bar


def caption(options: argparse.Namespace) -> int:
    """Caption images that have no caption with LLaVA, and write a .txt file beside each."""
    from hgdpo_core.devices import default_device, resolve_dtype
    from hgdpo_core.image_sets.captions import find_uncaptioned, write_captions

    images, device = find_uncaptioned(options.images), default_device()
    if not images.names:
        print(f"Images: {images.images:,}; all of them have captions")
        return 0
    if options.plan_only:
        print(f"Images: {images.images:,}; to caption: {len(images.names):,}")
        return 0
    from hgdpo_core.image_sets.llava import DEFAULT_MODEL, DEFAULT_QUESTION, Captioner, find_captioner

    captioner = Captioner(find_captioner(options.model or DEFAULT_MODEL), options.prompt or DEFAULT_QUESTION,
                          device=device, dtype=resolve_dtype(options.dtype), max_new_tokens=options.max_new_tokens)
    with terminal_bar("caption") as progress:
        result = write_captions(images, captioner.describe, batch_size=options.batch_size, progress=progress)
    print(f"Captions written: {result.written:,}; images that had one: {images.images - len(images.names):,}")
    for name, problem in result.problems.items():
        print(f"Without a caption: {name}: {problem}")
    return 0 if result.written or not result.problems else 1
