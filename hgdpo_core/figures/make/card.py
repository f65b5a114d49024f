"""The model card of the shipped weights, written from `metrics.json` so that no number is typed by hand."""

from pathlib import Path

_INTRODUCTION = """# The figures weights

A miniature Stable Diffusion 1.5 (`target/`), a judge in the shape of PickScore (`judge/`) and an inspector
(`inspector/`), a second witness of another architecture, for drawings of people, 64 x 64 pixels. They exist so that
the whole method can be seen at work on a CPU without a download. They know nothing about photographs: no result of
theirs says anything about a real model.

All of it was trained from nothing on pictures that `hgdpo_core/figures/renderer.py` draws, with one command:

    python -m hgdpo_core.figures --output hgdpo_core/figures/weights

This card is written by that command from `metrics.json`. Captions of the `train` split were used for training and of
the `test` split, with seeds of their own, for the numbers of VAE, judge and inspector. The `validation` split chose the
inspector's threshold and measures the target, so that the test prompts a report uses were not looked at.
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
    for stage in ("vae", "drawn_judge", "target", "inspector", "judge"):
        if stage in metrics:
            made = metrics[stage]["training"]
            plan = [made[name] for name in ("steps", "batch", "learning_rate", "threads", "machine")]
            rows.append([stage.replace("_", " "), *plan, f"{made['seconds'] / 60:.1f}"])
    header = ["network", "steps", "batch", "learning rate", "CPU threads", "machine", "minutes"]
    how = "AdamW, bf16 autocast, moving average of the weights. Minutes are of the clock, on a machine that\n"
    return f"## Training\n\n{table(header, rows)}\n{how}may have had other work to do.\n"


def describe_vae(made: dict) -> str:
    return (
        f"## VAE\n\nOver {made['pictures']} held-out pictures: PSNR {made['psnr_db']} dB over all pixels, "
        f"{made['psnr_person_db']} dB over the person's. Scaling factor {made['scaling_factor']}.\n"
    )


def describe_judge(made: dict) -> str:
    accuracy = made["accuracy"]
    rows: list[list[object]] = [
        [kind, *(f"{view[kind]:.1%}" if kind in view else "" for view in accuracy.values())]
        for kind in accuracy["clean"]
    ]
    text = (
        "How often the right picture of a caption outscores one with a defect, "
        f"{made['pairs_per_kind']} pairs of each kind; half of the pairs differ by nothing but the defect. "
        "`smeared` is a right picture decoded from very noisy latents. Through the VAE, half of the pictures "
        "also carry a little noise. Where the target made both pictures, it repairs some defects and fails elsewhere, "
        "so 100 % cannot be had."
    )
    columns = {"clean": "as drawn", "decoded": "through the VAE", "generated": "made by the target"}
    return f"## Judge\n\n{text}\n\n{table(['defect', *(columns[view] for view in accuracy)], rows)}"


def describe_inspector(made: dict) -> str:
    clean, decoded, called = made["accuracy"]["clean"], made["accuracy"]["decoded"], made["called_defective"]["decoded"]
    rows: list[list[object]] = [
        [kind, f"{clean[kind]:.1%}", f"{decoded[kind]:.1%}", f"{called[kind]:.1%}" if kind in called else ""]
        for kind in clean
    ]
    text = (
        "A convolutional network that names attributes and counts limbs; it never saw a caption, a pool or a picture "
        "of the target. The same pairs, ranked by its log-odds, and the share of broken pictures that it calls "
        f"defective. It calls {called['right']:.1%} of the right pictures through the VAE defective."
    )
    header = ["defect", "ranked right as drawn", "through the VAE", "called defective"]
    return f"## Inspector\n\n{text}\n\n{table(header, rows)}"


def describe_target(made: dict) -> str:
    reads, right = made["reads"], made["reads_right_pictures"]
    rows: list[list[object]] = [[name, f"{reads[name]:.1%}", f"{right[name]:.1%}"] for name in reads]
    text = (
        f"Over {made['prompts']} validation prompts, DPM-Solver++ {made['steps']} steps, guidance "
        f"{made['guidance']}: mean judge score {made['score']}. Right drawings of the same captions through "
        f"the VAE score {made['score_of_right_pictures']}; {made['share_above_right_picture']:.1%} of the "
        f"target's pictures score above theirs. The inspector calls {made['defective']:.1%} of them defective, and "
        f"{made['defective_right_pictures']:.1%} of the right drawings. How often the judge finds the caption's own "
        "word for an attribute the likeliest:"
    )
    return f"## Target\n\n{text}\n\n{table(['attribute', 'target', 'right drawings'], rows)}"


def write_card(path: Path, metrics: dict) -> None:
    """Write the card from the stages that `metrics` holds."""
    parts = [_INTRODUCTION, describe_training(metrics)]
    for stage, describe in (("vae", describe_vae), ("judge", describe_judge), ("inspector", describe_inspector)):
        if stage in metrics:
            parts.append(describe(metrics[stage]["metrics"]))
    if "judge" in metrics:
        parts.append(describe_target(metrics["judge"]["metrics"]["target"]))
    path.write_text("\n".join([*parts, _LIMITS]))
