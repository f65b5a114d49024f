"""`hgdpo pairs`."""

import argparse
from pathlib import Path

from flows.terminal import open_store, terminal_bar


def pairs(options: argparse.Namespace) -> int:
    """Write triplets as pairs of image files, in the layout that another trainer reads."""
    from hgdpo_core.export import export_pairs

    with terminal_bar("pairs") as progress:
        result = export_pairs(open_store(options.root), Path(options.to), options.layout, triplets=options.triplets,
                              limit=options.limit, progress=progress)
    print(f"Pairs of {result.triplets}: {result.written:,} written (there before: {result.existing:,}) of "
          f"{result.read:,} read")
    for reason, number in sorted(result.refused.items()):
        print(f"Refused: {number:,}: {reason}")
    if result.joined:
        print(f"Captions of several lines, made one: {result.joined:,}")
    print(result.config)
    return 0
