"""One table as HTML, as Markdown and as lines of text: the same texts, each escaped for its format."""

from hgdpo_core.rendering.tables import NO_SCORE, Cell, Table, with_interval

TABLE = Table(("Name", "Rate"), [("a <b>|</b>", with_interval("5 %", "1–9 %")), ("none", with_interval("–", "–"))],
              "Rates", ["Of 95 %."])


def test_html_escapes_texts_and_puts_intervals_below():
    html = TABLE.html()
    assert '<th scope="row">a &lt;b&gt;|&lt;/b&gt;</th><td>5 %<small>1–9 %</small></td>' in html
    assert "<td>–</td>" in html and 'aria-label="Rates"' in html and "<caption>" not in html
    assert TABLE.section("<hr>") == ('<section id="rates"><h2>Rates</h2><p class="intro">Of 95&nbsp;%.</p><hr>' + html
                                     + "</section>\n")
    captioned = Table(("p",), [("<0.0001",)], caption="p < 1 %").html()
    assert "<caption><span>p &lt; 1&nbsp;%</span></caption>" in captioned and ">&lt;0.0001</th>" in captioned


def test_only_web_addresses_become_links():
    table = Table(("Location",), [(Cell(text, code=True),) for text in ("https://a.org/?b&c", "javascript:x", "/a<b")])
    html = table.html()
    assert '<a href="https://a.org/?b&amp;c" rel="noreferrer"><code>https://a.org/?b&amp;c</code></a>' in html
    assert html.count("<a ") == 1 and "<code>/a&lt;b</code>" in html


def test_markdown_keeps_cells_apart():
    assert TABLE.markdown() == ("## Rates\n\nOf 95 %.\n\n| Name | Rate |\n| --- | --- |\n"
                                "| a &lt;b&gt;\\|&lt;/b&gt; | 5 % (1–9 %) |\n| none | – |")
    assert Table(("a",), [("two\nlines",)]).markdown() == "| a |\n| --- |\n| two lines |"


def test_markdown_of_a_prompt_fetches_nothing():
    prompt = "![x](https://a.org/x) `<img src=y>` *a*"
    assert Table(("prompt",), [(prompt,)]).markdown().splitlines()[2] == (
        "| !\\[x\\](https://a.org/x) \\`&lt;img src=y&gt;\\` \\*a\\* |")


def test_text_has_even_columns_and_numbers_to_the_right():
    rows = [("a", "1,200.5", "x", ""), ("longer", NO_SCORE, "12", "-3")]
    assert Table(("name", "score", "mixed", "gap"), rows).text() == (
        "name       score  mixed  gap\n"
        "a        1,200.5  x\n"
        "longer  no score  12     -3")
