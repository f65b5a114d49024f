"""The model card of the shipped weights, written from `metrics.json` so that no number is typed by hand."""

from pathlib import Path

_INTRODUCTION = """# The figures weights

A miniature Stable Diffusion 1.5 (`target/`) and a judge in the shape of PickScore (`judge/`), for drawings
of people, 64 x 64 pixels. They exist so that the whole method can be seen at work on a CPU without a
download. They know nothing about photographs: no result of theirs says anything about a real model.

All of it was trained from nothing on pictures that `hgdpo_core/figures/renderer.py` draws, with one command:

    python -m hgdpo_core.figures --output hgdpo_core/figures/weights

This card is written by that command from `metrics.json`. Captions of the `train` split were used for training
and of the `test` split, with seeds of their own, for every number below; `validation` stays for choosing
settings.
"""

_LIMITS = """## Limits

- The target is meant to be imperfect: wrong limbs, colours and poses are what preference tuning works on.
- The judge knows the defects it was trained on (`judge_data.KINDS`). It can be fooled by others, and tuning
  against it will find some: look at the pictures too.
- Only captions of the form of `hgdpo_core.figures.caption` mean anything to either of them.
- Numbers vary a little with the machine: bf16 arithmetic on another CPU trains a slightly different network.
"""


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def describe_training(metrics: dict) -> str:
    rows: list[list[object]] = []
    for stage in ("vae", "judge", "target"):
        if stage in metrics:
            made = metrics[stage]["training"]
            plan = [made[name] for name in ("steps", "batch", "learning_rate", "threads", "machine")]
            rows.append([stage, *plan, f"{made['seconds'] / 60:.1f}"])
    header = ["network", "steps", "batch", "learning rate", "CPU threads", "machine", "minutes"]
    how = "AdamW, bf16 autocast, moving average of the weights. Minutes are of the clock, on a machine that\n"
    return f"## Training\n\n{table(header, rows)}\n{how}may have had other work to do.\n"


def describe_vae(made: dict) -> str:
    return (
        f"## VAE\n\nOver {made['pictures']} held-out pictures: PSNR {made['psnr_db']} dB over all pixels, "
        f"{made['psnr_person_db']} dB over the person's. Scaling factor {made['scaling_factor']}.\n"
    )


def describe_judge(made: dict) -> str:
    clean, decoded = made["accuracy"]["clean"], made["accuracy"]["decoded"]
    rows: list[list[object]] = [[kind, f"{clean[kind]:.1%}", f"{decoded[kind]:.1%}"] for kind in clean]
    text = (
        "How often the right picture of a caption outscores one with a defect, "
        f"{made['pairs_per_kind']} pairs of each kind; half of the pairs differ by nothing but the defect. "
        "`smeared` is a right picture decoded from very noisy latents. Through the VAE, half of the pictures "
        "also carry a little noise."
    )
    return f"## Judge\n\n{text}\n\n{table(['defect', 'as drawn', 'through the VAE'], rows)}"


def describe_target(made: dict) -> str:
    reads, right = made["reads"], made["reads_right_pictures"]
    rows: list[list[object]] = [[name, f"{reads[name]:.1%}", f"{right[name]:.1%}"] for name in reads]
    text = (
        f"Over {made['prompts']} test prompts, DPM-Solver++ {made['steps']} steps, guidance "
        f"{made['guidance']}: mean judge score {made['score']}. Right drawings of the same captions through "
        f"the VAE score {made['score_of_right_pictures']}; {made['share_above_right_picture']:.1%} of the "
        "target's pictures score above theirs. How often the judge finds the caption's own word for an "
        "attribute the likeliest:"
    )
    return f"## Target\n\n{text}\n\n{table(['attribute', 'target', 'right drawings'], rows)}"


def write_card(path: Path, metrics: dict) -> None:
    """Write the card from the stages that `metrics` holds."""
    parts = [_INTRODUCTION, describe_training(metrics)]
    for stage, describe in (("vae", describe_vae), ("judge", describe_judge), ("target", describe_target)):
        if stage in metrics:
            parts.append(describe(metrics[stage]["metrics"]))
    path.write_text("\n".join([*parts, _LIMITS]))
