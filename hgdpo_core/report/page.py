"""The report page: the order of its sections, and image sizes that keep it small enough for mail."""

import functools
import json
from html import escape

from hgdpo_core.errors import InputError
from hgdpo_core.rendering.html import html_page
from hgdpo_core.rendering.parts import ImageEncoder, columns, encode_data_uri, listing, section, sentence, split
from hgdpo_core.report import numbers
from hgdpo_core.report.data import ReportData
from hgdpo_core.report.headline import headline, read_interval
from hgdpo_core.report.identity import identity
from hgdpo_core.report.images import first_pair, foreign_pairs, pairs, pools
from hgdpo_core.report.people import people
from hgdpo_core.report.training import latent_statistics, training_charts
from hgdpo_core.scorers import scorer_title

MAX_BYTES = 10_000_000
QUALITY_LEVELS = ((640, 85), (448, 80), (320, 72), (224, 60))  # longer side in pixels, WebP quality


def render_report(data: ReportData) -> str:
    """The page as HTML, under 10 MB in UTF-8.

    Images shrink until it fits; InputError if even the smallest do not. Prompts, notes and names are escaped, and the
    content policy of the page forbids every network request.
    """
    size = 0
    for side_px, quality in QUALITY_LEVELS:
        page = _page(data, functools.partial(encode_data_uri, side_px=side_px, quality=quality))
        size = len(page.encode())
        if size < MAX_BYTES:
            return page
    raise InputError(f"the report would have {size:,} bytes with the smallest images; expected under "
                     f"{MAX_BYTES:,}: pass fewer pairs or pools")


def _page(data: ReportData, encode: ImageEncoder) -> str:
    comparison = data.comparison
    shown = f" Below each image its score by {scorer_title(next(iter(comparison.win_rates)))}."
    if comparison.images_per_prompt > 1:
        shown += (f" The first of a prompt's {comparison.images_per_prompt} images is shown; scores are means over "
                  "them all.")
    sections = (
        listing("Warnings", data.warnings, "warnings"),
        columns(numbers.win_rates(data), people(data.people, comparison.win_rates, data.root),
                numbers.defects(comparison), numbers.variety(comparison.variety_change),
                listing("What to keep in mind", data.notes, "notes")),
        pairs("Side by side", f"A random sample of held-out prompts, both models from one seed.{shown}", data.pairs,
              encode),
        columns(pairs("Best wins", "Where the tuned model gained most.", data.best_wins, encode),
                pairs("Worst losses", "Where the tuned model lost most.", data.worst_losses, encode)),
        identity(comparison),
        numbers.colours(comparison),
        numbers.lora_weights(data.sweep),
        pools(data.pools, encode),
        foreign_pairs(data.foreign, encode),
        training_charts(data.objective, data.training_log),
        split(training_charts("sft", data.sft_log), latent_statistics(data.rank_distances), (3, 2)),
        columns(numbers.counts(data.counts), numbers.timings(data.timings), numbers.artifacts(data.artifacts),
                _repeat(data)),
    )
    when = data.created_at.strftime("%Y-%m-%d %H:%M %Z").strip()
    below = f"""<p class="reading">{sentence(read_interval(data))}</p>
<p class="meta">{when} · <code>{escape(data.root)}</code></p>"""
    return html_page(data.title, eyebrow=f"HG-DPO · preset {data.preset}", lead=headline(data), below=below,
                     main="".join(sections), beside=first_pair(data.pairs, encode), contents=True)


def _repeat(data: ReportData) -> str:
    settings = json.dumps(data.config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    body = (f"<pre><code>{escape(data.command)}</code></pre><details><summary>All settings of this run</summary>"
            f"<pre><code>{escape(settings)}</code></pre></details>")
    intro = "With the same root finished results are reused; with another root everything is made again."
    return section("How to repeat", intro, body)
