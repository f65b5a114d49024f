"""The frame and the style sheet of all HTML pages: self-contained files without scripts or fonts.

The content policy forbids every network request. Dark mode only changes the variables of the style sheet.
"""

import re
from html import escape

from hgdpo_core.rendering.parts import sentence

SECTION = re.compile(r'<section id="([^"]+)"><h2>(.*?)</h2>')
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, *, eyebrow: str, lead: str, below: str, main: str, heading: str = "", style: str = "",
              beside: str = "", contents: bool = False) -> str:
    """A page as HTML. `eyebrow`, `heading` (by default the title) and `lead` are plain text that opens the page.

    `below` (the rest of the header), `beside` (on its right, where there is room) and `main` are markup; `style` is CSS
    that follows the common style sheet. `contents`: a list of the sections of `main`, as links.
    """
    listed = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in SECTION.findall(main))
    nav = f'<nav aria-label="Contents"><ul>{listed}</ul></nav>\n' if contents else ""
    aside = f'<div class="beside">{beside}</div>' if beside else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<header>
<div><p class="eyebrow">{escape(eyebrow)}</p>
<h1>{escape(heading or title)}</h1>
<p class="lead">{sentence(lead)}</p>
{below}</div>
{aside}
</header>
{nav}<main>
{main}</main>
<footer><p>Method: arXiv:2405.20216v1. This page is self-contained; it loads nothing from elsewhere.</p></footer>
</body>
</html>
"""


STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --panel: #f2f3f5; --ink: #181a20; --faint: #5b616d;
  --line: #dfe1e6; --accent: #1665c0; --loss: #b4440d; }
@media (prefers-color-scheme: dark) { :root { --page: #13151a; --panel: #1d2027; --ink: #e9eaee;
  --faint: #a3a9b5; --line: #30343d; --accent: #74aefc; --loss: #f29a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer, nav { max-width: 1280px; margin: 0 auto; padding: 0 20px; }
header { padding-top: clamp(32px, 4vw, 56px); display: grid; gap: 28px 48px; align-items: start; }
.beside { min-width: 0; }
nav { margin-top: 28px; }
nav ul { display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 12px 0; border: solid var(--line);
  border-width: 1px 0; font-size: .9rem; }
@media (min-width: 960px) { header:has(.beside) { grid-template-columns: minmax(0, 1fr) minmax(0, 30rem); }
  .columns { columns: 2; column-gap: 48px; } .columns > section { break-inside: avoid; }
  .columns > section:first-child { margin-top: 0; } .split { display: grid;
    gap: 0 48px; align-items: start; } .split table { min-width: 0; } .columns table { min-width: 0; } }
.columns { margin-top: clamp(28px, 3vw, 38px); }
h1 { font-size: clamp(1.7rem, 4vw, 2.6rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 1.2rem; }
h2 { font-size: 1.45rem; letter-spacing: -0.01em; margin: 0 0 .4rem; }
section { margin-top: clamp(28px, 3vw, 38px); scroll-margin-top: 12px; }
p, ul.notes, ul.warnings { max-width: 68ch; }
.eyebrow { color: var(--accent); font-weight: 600; margin: 0 0 .5rem; }
.lead { font-size: clamp(1.15rem, 2.2vw, 1.4rem); line-height: 1.45; margin: 0 0 .8rem; }
.reading { margin: 0 0 .8rem; }
.meta, .intro, caption, small, figcaption, footer { color: var(--faint); }
.meta, footer { font-size: .875rem; }
.intro { margin: 0 0 1.4rem; }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
a { color: var(--accent); }
i { font-style: normal; }
ul, ol, dl { list-style: none; margin: 0; padding: 0; }
.notes, .warnings { border-left: 3px solid var(--accent); padding-left: 18px; }
.warnings { border-color: var(--loss); }
.notes li + li, .warnings li + li { margin-top: .6rem; }
.bars { display: grid; gap: 12px; }
.bars li { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 12px; }
.bars b { font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.rate-bar { flex: 0 0 100%; width: 100%; height: 26px; display: block; }
.rate-bar .track { fill: var(--panel); }
.rate-bar .bar { fill: var(--accent); opacity: .38; }
.rate-bar path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }
.rate-bar .edge { stroke: var(--accent); stroke-width: 3; }
.rate-bar .whisker { stroke: var(--ink); }
.rate-bar .half { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 3 3; }
.rate-bar.target .bar { fill: var(--faint); }
.rate-bar.target .edge { stroke: var(--faint); }
.bars small { font-size: .8rem; }
.scale { display: flex; max-width: none; margin: 4px 0 28px; font-size: .8rem; color: var(--faint); }
.scale span { flex: 1; }
.scale span:nth-child(2) { text-align: center; }
.scale span:last-child { text-align: right; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: min(100%, 44rem); }
caption { text-align: left; font-size: .875rem; padding-bottom: 8px; }
caption span { display: block; max-width: calc(100vw - 40px); }
th, td { text-align: left; padding: 6px 20px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
td { white-space: nowrap; }
thead th { font-size: .8rem; font-weight: 500; color: var(--faint); white-space: nowrap; }
tbody th { font-weight: 600; }
td small, tbody th small { display: block; font-weight: 400; font-size: .8rem; }
.scroll + .scroll, .scroll + .intro, .charts + .scroll { margin-top: 36px; }
figure { margin: 0; }
figcaption { font-size: .8rem; font-variant-numeric: tabular-nums; margin-top: 6px; }
figcaption b { font-weight: 600; color: var(--ink); }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
img.tiny { image-rendering: pixelated; border-radius: 3px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr));
  gap: 28px 24px; }
.cards:has(img.tiny) { grid-template-columns: repeat(auto-fill, minmax(min(100%, 180px), 1fr)); gap: 18px 20px; }
.cards:has(img.tiny) figcaption { font-size: .72rem; line-height: 1.3; margin-top: 4px; }
.cards:has(img.tiny) .prompt { font-size: .85rem; line-height: 1.3; margin-top: 4px; }
details .cards { margin-top: 18px; }
details > summary { margin-top: 14px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pair.personal { grid-template-columns: 1fr 2fr 2fr; }
.higher img, .winner img { outline: 3px solid var(--accent); outline-offset: 2px; }
.loser img { outline: 3px solid var(--loss); outline-offset: 2px; }
.higher i, .winner i { color: var(--accent); font-weight: 600; }
.loser i { color: var(--loss); font-weight: 600; }
.prompt { unicode-bidi: plaintext; margin: 8px 0 0; font-size: .95rem; line-height: 1.4; }
h3.prompt { font-weight: 600; margin: 20px 0 10px; max-width: 68ch; }
/* Ten of a pool's 20 in a row where there is room. */
.pool { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(64px, 8.8%), 1fr)); gap: 12px; }
.pool:has(img.tiny) { grid-template-columns: repeat(auto-fill, minmax(max(48px, 8.8%), 1fr)); gap: 8px 10px; }
.pool figcaption { margin-top: 4px; line-height: 1.25; }
.pool figcaption i { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 208px), 1fr));
  gap: 28px 24px; }
.chart figcaption { display: grid; grid-template-columns: 1fr auto; margin: 0 0 8px; font-size: .95rem; }
.chart small { grid-column: 1 / -1; font-size: .8rem; }
.chart svg { width: 100%; display: block; }
.chart polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .raw { stroke-width: 1; opacity: .28; }
.chart .second { stroke: var(--loss); }
.chart .smooth.second { stroke-dasharray: 6 3; }
.chart .area { fill: var(--faint); opacity: .32; }
.chart .outline { fill: none; stroke: var(--accent); stroke-width: 2; }
.chart .grid { stroke: var(--line); }
.chart .baseline { stroke: var(--faint); stroke-dasharray: 4 4; }
.chart .whisker { fill: none; stroke: var(--ink); }
.chart .dot { fill: var(--accent); }
.chart .tick { fill: var(--faint); font-size: 11px; }
.counts { display: flex; flex-wrap: wrap; gap: 20px 48px; }
.counts dt { color: var(--faint); font-size: .875rem; }
.counts dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
td code, pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: 8px; padding: 14px 16px; overflow-x: auto; }
summary { cursor: pointer; }
footer { margin-top: 56px; padding-bottom: 40px; }
@media (max-width: 480px) { table { font-size: .92rem; } th, td { padding-right: 9px; }
  td:last-child { padding-right: 0; } }
@media print { nav { display: none; } body { font-size: .85rem; } section { margin-top: 24px; }
  .cards li, .chart, tr, figure, .bars li { break-inside: avoid; } h2, .intro, caption { break-after: avoid; }
  header:has(.beside) { grid-template-columns: minmax(0, 1fr) 15rem; }
  .pool figcaption { font-size: .6rem; overflow-wrap: normal; }
  details::details-content { content-visibility: visible; } }
"""
