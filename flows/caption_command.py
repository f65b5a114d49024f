"""`hgdpo caption`."""

import argparse
from typing import Any

from flows.bars import terminal_bar


def caption(options: argparse.Namespace) -> int:
    """Write captions by LLaVA for images that have none, as a .txt beside each."""
    from hgdpo_core.image_sets.captions import find_uncaptioned, write_captions
    from hgdpo_core.models import default_device, resolve_dtype

    images, device = find_uncaptioned(options.images), default_device()
    if not images.names:
        print(f"All {images.images:,} images have captions")
        return 0
    if options.plan:
        print(f"To caption: {len(images.names):,} of {images.images:,} images")
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


def add_caption_command(commands: Any) -> None:
    """Put the command into the parser of `hgdpo`."""
    command = commands.add_parser("caption", help=(caption.__doc__ or "").splitlines()[0])
    command.add_argument("--images", required=True, help="folder of image files, path or URL; captions that are there "
                         "stay as they are")
    command.add_argument("--model", help="LLaVA in transformers' form: folder or hub id; default "
                         "llava-hf/llava-1.5-7b-hf")
    command.add_argument("--prompt", metavar="TEXT", help="what the model is asked about each image")
    command.add_argument("--batch-size", type=_positive, default=8, help="images described together; default 8")
    command.add_argument("--max-new-tokens", type=_positive, default=75, help="longest caption; default 75, about what "
                         "SD 1.5 reads")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                         help="precision of the model; auto: bfloat16 where it is fast, else float32")
    command.add_argument("--plan", action="store_true", help="say how many images lack a caption, and stop")
    command.set_defaults(command=caption)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)
