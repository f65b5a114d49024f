"""One run as one HTML file: no network, no script, light and dark, fit for a phone and a screen reader."""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape

from PIL import Image

from hgdpo_core.config import RunConfig
from hgdpo_core.errors import InputError
from hgdpo_core.grids import PairSample, PoolSample, format_score, rank_pool
from hgdpo_core.metrics import ColourShift, WinRate
from hgdpo_core.plots import STYLE, ChartSpec, line_chart, win_rate_bar

MAX_BYTES = 10_000_000
TINY_PX = 128  # images up to this side stay lossless, and hard pixels are shown as such
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
QUALITY_LEVELS = ((640, 85), (448, 80), (320, 72), (224, 60))  # longer side in pixels, WebP quality
SCORER_TITLES = {"pickscore": "PickScore", "hps": "HPS v2", "image_reward": "ImageReward",
                 "aesthetic": "LAION aesthetic", "clip": "CLIP",
                 "tinted": "PickScore with a fondness for warm tints (made up to study colour shift)"}
ACRONYMS = {"sft": "SFT", "dpo": "DPO", "lora": "LoRA"}

DPO_CHARTS = (
    ChartSpec("Loss", ("loss",), "all terms together, weighted"),
    ChartSpec("DPO loss", ("dpo_loss",), "dashed: log 2, policy equal to reference", math.log(2)),
    ChartSpec("Statistic matching loss", ("stat_loss",), "0: colours stay where they were"),
    ChartSpec("Margin", ("margin",), "below 0: winners gained on losers", 0.0),
    ChartSpec("Implicit accuracy", ("implicit_accuracy",), "share of pairs with a margin below 0", 0.5),
    ChartSpec("Denoising error", ("winner_error", "loser_error"), "policy: winner solid, loser dashed"),
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)
SFT_CHARTS = (
    ChartSpec("Loss", ("loss",), "denoising error of the target model"),
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. Empty or None parts leave their section out, or say that there is nothing."""

    preset: str
    title: str
    config: RunConfig
    root: str
    """URL or path of the object store; must hold no secret, for it is printed."""
    created_at: datetime
    command: str
    """Shell line that starts this run again."""
    win_rates: Mapping[str, WinRate]
    """Tuned over target by scorer name; the first is the headline, and its scores stand under the pairs."""
    lora_weight: float | None
    """None where the tuned model wears no LoRA."""
    colour_shift: ColourShift | None
    """Tuned against target on the evaluation images."""
    counts: Mapping[str, int]
    """Shown in this order; underscores become spaces: prompts, pool_images, triplets, rejected, ..."""
    pairs: Sequence[PairSample] = ()
    """A random sample of evaluation prompts, not a selection."""
    best_wins: Sequence[PairSample] = ()
    worst_losses: Sequence[PairSample] = ()
    pools: Sequence[PoolSample] = ()
    training_log: Sequence[Mapping[str, float]] = ()
    """Rows with step, loss, dpo_loss, stat_loss, margin, implicit_accuracy, winner_error, loser_error,
    grad_norm, learning_rate; a column that is missing has no chart."""
    sft_log: Sequence[Mapping[str, float]] = ()
    """Rows with step, loss, grad_norm, learning_rate."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, in the order of the run."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Path or URL by name; http(s) URLs become links."""
    notes: Sequence[str] = ()
    """Honest remarks, one sentence or two each."""
    warnings: Sequence[str] = ()
    """What the guards found; they stand above everything but the headline."""


ImageEncoder = Callable[[Image.Image], str]


def render_report(data: ReportData) -> str:
    """The page as HTML text, under 10 MB in UTF-8.

    Images shrink until it fits; where even the smallest do not, InputError says what to drop. Prompts, notes and
    names are shown as text, never as markup, and the page forbids itself every network request.
    """
    size = 0
    for side_px, quality in QUALITY_LEVELS:
        page = _page(data, lambda image, side=side_px, q=quality: encode_data_uri(image, side, q))
        size = len(page.encode())
        if size < MAX_BYTES:
            return page
    raise InputError(f"the report would have {size:,} bytes with the smallest images; expected under "
                     f"{MAX_BYTES:,}: hand in fewer pairs or pools")


def headline(data: ReportData) -> str:
    """The result in one sentence, with its interval and counts; plain text."""
    if not data.win_rates:
        return "This run has no evaluation."
    name, rate = next(iter(data.win_rates.items()))
    scorer, prompts = SCORER_TITLES.get(name, name), _count(rate.n, "held-out prompt")
    start = scorer if data.lora_weight is None else f"With the LoRA at weight {float(data.lora_weight)}, {scorer}"
    if rate.rate is None:
        return f"{start} tells the two models apart on none of {prompts}."
    tally = f"{_count(rate.wins, 'win')}, {_count(rate.losses, 'loss', 'losses')}"
    interval = f"95 % interval {_interval(rate)}"
    start += f" prefers the tuned model on {_percent(rate.rate)} of"
    if not rate.ties:
        return f"{start} {prompts} ({interval}; {tally}, no ties)."
    ties = _count(rate.ties, "tie")
    return f"{start} the held-out prompts it tells apart ({interval}; {tally}, {ties} among {rate.n:,} prompts)."


def read_interval(data: ReportData) -> str:
    """What the headline's interval allows to say, and what the choice of scorer does not; plain text."""
    if not data.win_rates:
        return ""
    name, rate = next(iter(data.win_rates.items()))
    if rate.ci_low is None or rate.ci_high is None:
        reading = "Without a single win or loss there is no win rate."
    elif rate.ci_low > 0.5:
        reading = "The whole interval lies above 50 %: by this scorer the tuned model is better."
    elif rate.ci_high < 0.5:
        reading = "The whole interval lies below 50 %: by this scorer the tuned model is worse."
    else:
        reading = "The interval contains 50 %: these prompts do not show which model is better."
    if name == data.config.scorer.name:
        reading += (" The same scorer chose the training pairs, so this measures whether training reached its aim, "
                    "not what people prefer.")
    return reading


def encode_data_uri(image: Image.Image, side_px: int, quality: int) -> str:
    """WebP data URI with the longer side at most `side_px`; images up to 128 pixels keep every pixel."""
    image = image.convert("RGB")
    tiny = max(image.size) <= TINY_PX
    if not tiny:
        image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=tiny, quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(data: ReportData, encode: ImageEncoder) -> str:
    sections = (
        _list("Warnings", data.warnings, "warnings"),
        _win_rates(data),
        _list("What to keep in mind", data.notes, "notes"),
        _pairs("Side by side", "A random sample of held-out prompts, both models from one seed.", data.pairs, encode),
        _pairs("Best wins", "Where the tuned model gained most.", data.best_wins, encode),
        _pairs("Worst losses", "Where the tuned model lost most.", data.worst_losses, encode),
        _pools(data.pools, encode),
        _charts("DPO training", DPO_CHARTS, data.training_log),
        _charts("Supervised fine-tuning", SFT_CHARTS, data.sft_log),
        _colour_shift(data.colour_shift),
        _counts(data.counts),
        _timings(data.timings),
        _artifacts(data.artifacts),
        _repeat(data),
    )
    when = data.created_at.strftime("%Y-%m-%d %H:%M %Z").strip()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(data.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="eyebrow">HG-DPO · preset {escape(data.preset)}</p>
<h1>{escape(data.title)}</h1>
<p class="lead">{_sentence(headline(data))}</p>
<p class="reading">{_sentence(read_interval(data))}</p>
<p class="meta">{when} · <code>{escape(data.root)}</code></p>
</header>
<main>
{"".join(sections)}</main>
<footer><p>Method: arXiv:2405.20216v1. This page holds all it shows; it loads nothing from elsewhere.</p></footer>
</body>
</html>
"""


def _section(title: str, intro: str, body: str) -> str:
    lead = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>\n"


def _sentence(text: str) -> str:
    """`text` as HTML in which no line ends between a number and its percent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of HTML cells, the first of each row its heading; a wide table scrolls by itself, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                   for first, *rest in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
            f"<table><caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def _win_rates(data: ReportData) -> str:
    if not data.win_rates:
        return ""
    titled = [(escape(SCORER_TITLES.get(name, name)), rate) for name, rate in data.win_rates.items()]
    bars = "".join(f"<li><span>{title}</span><b>{_percent(rate.rate)}</b>{win_rate_bar(rate)}</li>"
                   for title, rate in titled)
    scale = '<p class="scale" aria-hidden="true"><span>0 %</span><span>50 %</span><span>100 %</span></p>'
    rows = [(title, _percent(rate.rate), _interval(rate),
             *(f"{count:,}" for count in (rate.wins, rate.losses, rate.ties, rate.n))) for title, rate in titled]
    table = _table("Wins / (wins + losses) with its Clopper-Pearson interval; ties count apart.",
                   ("Scorer", "Win rate", "95 % interval", "Wins", "Losses", "Ties", "Prompts"), rows)
    weight = "" if data.lora_weight is None else f" (LoRA weight {float(data.lora_weight)})"
    intro = f"How often the tuned model{weight} scores above the target model."
    return _section("Win rates", intro, f'<ul class="bars">{bars}</ul>{scale}{table}')


def _list(title: str, sentences: Sequence[str], style: str) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return _section(title, "", f'<ul class="{style}">{items}</ul>') if sentences else ""


def _pairs(title: str, intro: str, pairs: Sequence[PairSample], encode: ImageEncoder) -> str:
    cards = []
    for pair in pairs:
        sides = (("target", pair.target, pair.target_score, pair.tuned_score),
                 ("tuned", pair.tuned, pair.tuned_score, pair.target_score))
        images = ""
        for name, image, score, other in sides:
            style, word = (' class="higher"', " <i>higher</i>") if score > other else ("", "")
            images += (f"<figure{style}>{_image(image, f'{name} model: {pair.prompt}', encode)}"
                       f"<figcaption>{name} <b>{format_score(score)}</b>{word}</figcaption></figure>")
        cards.append(f'<li><div class="pair">{images}</div><p class="prompt">{escape(pair.prompt)}</p></li>')
    return _section(title, intro, f'<ul class="cards">{"".join(cards)}</ul>') if pairs else ""


def _pools(pools: Sequence[PoolSample], encode: ImageEncoder) -> str:
    blocks = []
    for pool in pools:
        roles = {pool.winner: "winner", pool.loser: "loser"}
        tiles = []
        for rank, i in enumerate(rank_pool(pool), start=1):
            role = roles.get(i, "")
            alt = f"rank {rank} of {len(pool.images)} {role}".strip()
            tiles.append(f'<li class="{role}"><figure>{_image(pool.images[i], alt, encode)}<figcaption>'
                         f"{rank}. <b>{format_score(pool.scores[i])}</b> <i>{role}</i></figcaption></figure></li>")
        verdict = " <small>(no pair: not used)</small>" if pool.winner < 0 or pool.loser < 0 else ""
        heading = f'<h3 class="prompt">{escape(pool.prompt)}{verdict}</h3>'
        blocks.append(f'{heading}<ol class="pool">{"".join(tiles)}</ol>')
    intro = "All candidates of a prompt, best first. Winner and loser, outlined, became a training triplet."
    return _section("Pools in their ranking", intro, "".join(blocks)) if pools else ""


def _image(image: Image.Image, alt: str, encode: ImageEncoder) -> str:
    tiny = ' class="tiny"' if max(image.size) <= TINY_PX else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="{encode(image)}" alt="{escape(alt)}" {size}{tiny}>'


def _charts(title: str, specs: Sequence[ChartSpec], log: Sequence[Mapping[str, float]]) -> str:
    charts = "".join(line_chart(spec, log) for spec in specs)
    if not charts:
        return ""
    broken = sum(any(not math.isfinite(value) for value in row.values()) for row in log)
    intro = (f"{_count(len(log), 'log row')}. Faint: each row, cut at the 1st and 99th percentile; strong: moving "
             "average over 5 % of the rows, whose last value is printed.")
    if broken:
        intro += f" {_count(broken, 'row')} held values that are not finite; those values are left out."
    return _section(title, intro, f'<div class="charts">{charts}</div>')


def _colour_shift(shift: ColourShift | None) -> str:
    if shift is None:
        return ""
    percent = ["not defined" if value is None else f"{value:.2f} %" for value in shift[:3]]
    degrees = "not defined" if shift.hue_degrees is None else f"{shift.hue_degrees:+.2f}°"
    rows = (("Hue as an angle", degrees, "circular mean"),
            ("Hue", percent[0], "plain mean"),
            ("Saturation", percent[1], "plain mean"),
            ("Value", percent[2], "plain mean"))
    table = _table("Tuned against target over all pixels of the evaluation images; 0 is no shift.",
                   ("Channel", "Shift", "How"), rows)
    intro = ("Hue is an angle, so read the first row: weighted by saturation, + from red towards yellow. The plain "
             "means compare with the paper's Table 2.")
    return _section("Colour shift", intro, table)


def _counts(counts: Mapping[str, int]) -> str:
    items = "".join(f"<div><dt>{escape(_words(name))}</dt><dd>{count:,}</dd></div>"
                    for name, count in counts.items())
    return _section("Counts", "", f'<dl class="counts">{items}</dl>') if counts else ""


def _timings(timings: Mapping[str, float]) -> str:
    total = sum(timings.values())
    rows = [(escape(_words(stage)), _duration(seconds), f"{100 * seconds / total if total else 0:.0f} %")
            for stage, seconds in timings.items()]
    rows.append(("Total", _duration(total), ""))
    return _section("Timings", "", _table("Time by stage.", ("Stage", "Time", "Share"), rows)) if timings else ""


def _artifacts(artifacts: Mapping[str, str]) -> str:
    if not artifacts:
        return ""
    rows = []
    for name, place in artifacts.items():
        shown = f"<code>{escape(place)}</code>"
        if place.startswith(("https://", "http://")):
            shown = f'<a href="{escape(place)}" rel="noreferrer">{shown}</a>'
        rows.append((escape(_words(name)), shown))
    return _section("Artifacts", "", _table("What the run left.", ("Artifact", "Place"), rows))


def _repeat(data: ReportData) -> str:
    settings = json.dumps(data.config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    body = (f"<pre><code>{escape(data.command)}</code></pre><details><summary>All settings of this run</summary>"
            f"<pre><code>{escape(settings)}</code></pre></details>")
    intro = "The same root reuses what is finished; another root makes everything anew."
    return _section("How to repeat", intro, body)


def _words(name: str) -> str:
    text = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return text[:1].upper() + text[1:]


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _interval(rate: WinRate) -> str:
    if rate.ci_low is None or rate.ci_high is None:
        return "–"
    return f"{100 * rate.ci_low:.1f}–{100 * rate.ci_high:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    return f"{hours} h {minutes % 60} min" if hours else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
