"""An ablation as one HTML file: its tables, plots and pictures, no network, no script."""

from collections.abc import Mapping, Sequence
from html import escape

from hgdpo_core.ablate.program import Ablation
from hgdpo_core.ablate.tables import AblationTable
from hgdpo_core.rendering.html import html_page

WIDE = """
.scroll table { min-width: max-content; }
.plots { max-width: none; }
.plots img { width: auto; max-width: min(100%, 960px); }
section.plots img { max-width: 100%; }
"""


def render_page(ablation: Ablation, tables: Sequence[AblationTable], pictures: Mapping[str, tuple[str, str]],
                notes: Sequence[str]) -> str:
    """The page as HTML text. `pictures`: name -> title and data URI; those of no table follow at the end."""
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    named = {table.plot for table in tables}
    rest = "".join(f'<section class="plots"><h2>{escape(title)}</h2><img src="{uri}" alt="{escape(title)}"></section>\n'
                   for name, (title, uri) in pictures.items() if name not in named)
    preset = ablation.run.config.preset
    header = f"""<p class="eyebrow">HG-DPO · ablations · preset {escape(preset)}</p>
<h1>The paper's comparisons from one pool</h1>
<p class="lead">The tables of arXiv:2405.20216v1 measured here, the paper's own numbers beside them.</p>
<ul class="notes">{remarks}</ul>"""
    main = f"""{"".join(_section(table, pictures.get(table.plot)) for table in tables)}{rest}
<section><h2>How to repeat</h2><pre><code>{escape(ablation.command)}</code></pre></section>
"""
    return html_page(f"HG-DPO ablations, preset {preset}", header, main, style=WIDE)


def _section(table: AblationTable, picture: tuple[str, str] | None) -> str:
    plot = f'<p class="plots"><img src="{picture[1]}" alt="{escape(table.title)}, as a plot"></p>' if picture else ""
    return table.section(plot)
