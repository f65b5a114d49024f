"""The report: its content, that it is self-contained, and that no input breaks it. Images are rectangles."""

import base64
import dataclasses
import io
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hgdpo_core.config.presets import figures, sd15
from hgdpo_core.errors import InputError
from hgdpo_core.evaluate import Comparison
from hgdpo_core.metrics import ColourShift, WinRate, rgb_to_hsv
from hgdpo_core.rendering.charts import (
    BOTTOM,
    HISTOGRAMS,
    LEFT,
    RIGHT,
    TOP,
    ChartSpec,
    count_chart,
    format_number,
    fraction_bar,
    histogram,
    interval_chart,
    line_chart,
    rate_bar,
    read_line,
    smooth,
)
from hgdpo_core.rendering.grids import PairSample, PoolSample
from hgdpo_core.rendering.html import STYLE
from hgdpo_core.rendering.parts import p_value, signed, span
from hgdpo_core.report import ReportData, encode_data_uri, headline, read_interval, render_report
from hgdpo_core.report import page as report_page
from hgdpo_core.statistics.colours import ColourChange, ColourHistograms
from hgdpo_core.statistics.intervals import Estimate, Interval, defect_change, score_change

EVIL = """a man <script>alert("x")</script> & 'friends' <img src=http://example.org/x.png>"""
VOID = {"meta", "img", "line", "rect", "path", "polyline", "circle", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; refuses tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make_image(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new("RGB", size, (40 * number % 256, 90, 160))
    image.paste((220, 180, 150), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def sample_pair(prompt: str = "a woman", size: tuple[int, int] = (64, 64)) -> PairSample:
    return PairSample(prompt, make_image(1, size), make_image(2, size), 21.0, 21.5)


def sample_log(rows: int) -> list[dict[str, float]]:
    return [{"step": float(i + 1), "loss": 1 / (i + 1), "dpo_loss": 0.6, "stat_loss": 1e-6, "margin": -1e-4,
             "implicit_accuracy": 0.75, "winner_error": 0.1, "loser_error": 0.2,
             "reference_winner_error": 0.1, "reference_loser_error": 0.15, "grad_norm": 1.0,
             "learning_rate": 1e-5} for i in range(rows)]


def histograms(seed: int) -> ColourHistograms:
    result = ColourHistograms()
    result.update(*rgb_to_hsv(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    return result


NONE = Estimate(None, None, None)
SAME = score_change([1.0, 2.0], [1.0, 2.0])
COMPARISON = Comparison(
    evaluation_id="3-abc", prompts=["a"], win_rates={"pickscore": WinRate.from_counts(0, 0, 2)}, target_scores={},
    tuned_scores={}, colour_shift=ColourShift(None, None, None, None), lora_weight=1.0, images_per_prompt=1,
    score_changes={"pickscore": SAME}, win_rate_intervals={}, defects={},
    colour_change=ColourChange(NONE, NONE, NONE, NONE, None, None), target_histograms=ColourHistograms(),
    tuned_histograms=ColourHistograms(), variety_change=NONE)

EMPTY = ReportData(
    preset="figures", title="A run", config=figures(), root="/data/run",
    created_at=datetime(2030, 1, 2, 3, 4, tzinfo=UTC), command="hgdpo run --root '/a b'",
    comparison=COMPARISON, counts={}, training_scorer="pickscore")

FULL = dataclasses.replace(
    EMPTY, title=EVIL, root="s3://bucket/<root>", counts={"prompts": 1200, "pool_images": 24_000},
    pairs=[sample_pair(EVIL), sample_pair()], best_wins=[sample_pair()], worst_losses=[sample_pair()],
    pools=[PoolSample(EVIL, [make_image(i) for i in range(3)], [2.0, 3.0, 1.0], 1, 2),
           PoolSample("a man", [make_image(i) for i in range(2)], [1.0, 1.0], -1, -1)],
    comparison=dataclasses.replace(
        COMPARISON, lora_weight=0.5, colour_shift=ColourShift(1.234, 0.5, None, -1.7),
        win_rates={"pickscore": WinRate.from_counts(310, 196, 6), "aesthetic": WinRate.from_counts(0, 0, 512)},
        score_changes={"pickscore": score_change([3.0, 1.0, 2.5], [1.0, 1.5, 2.0]), "aesthetic": SAME},
        defects={"pickscore": defect_change([[1.0], [-1.0]], [[-1.0], [-1.0]], 0.0)},
        colour_change=ColourChange(Estimate(-1.7, -90.0, 60.0), Estimate(1.234, 0.5, 2.0), Estimate(-0.5, -1.0, 0.0),
                                   NONE, 0.02, 0.03),
        variety_change=Estimate(-12.34, -15.0, -9.0), target_histograms=histograms(1), tuned_histograms=histograms(2)),
    warnings=[f"Collapse: {EVIL}"],
    training_log=sample_log(500), sft_log=[{"step": 1.0, "loss": 0.2}],
    timings={"pool": 4000.0, "train": 61.0}, notes=[EVIL],
    artifacts={"report": "https://example.org/a?b=1&c=2", "lora": "javascript:alert(1)"})


def with_comparison(data: ReportData, **changes: object) -> ReportData:
    return dataclasses.replace(data, comparison=dataclasses.replace(data.comparison, **changes))


def with_rates(rates: dict[str, WinRate]) -> ReportData:
    return with_comparison(EMPTY, win_rates=rates, score_changes=dict.fromkeys(rates, SAME))


def with_rate(wins: int, losses: int, ties: int, name: str = "pickscore") -> ReportData:
    return with_rates({name: WinRate.from_counts(wins, losses, ties)})


# --- its content


def test_headline_has_rate_interval_and_counts():
    # Interval: scipy.stats.beta.ppf(0.025, 310, 197) = 0.5686..., ppf(0.975, 311, 196) = 0.6553...
    assert headline(FULL) == (
        "With the LoRA at weight 0.5, the figures judge prefers the tuned model on 61.3 % of the held-out prompts it "
        "tells apart (95 % interval 56.9–65.5 %; 310 wins, 196 losses, 6 ties among 512 prompts).")
    assert headline(with_rate(1, 0, 0)) == (
        "With the LoRA at weight 1.0, the figures judge prefers the tuned model on 100.0 % of 1 held-out prompt "
        "(95 % interval 2.5–100.0 %; 1 win, 0 losses, no ties).")


def test_headline_names_the_built_in_scorers_as_what_they_are():
    """A small model of PickScore's shape is not PickScore, and the judge's number comes with the inspector's."""
    rates = {"pickscore": WinRate.from_counts(9, 1, 0), "inspector": WinRate.from_counts(3, 1, 6)}
    assert headline(with_rates(rates)).endswith(
        "(95 % interval 55.5–99.7 %; 9 wins, 1 loss, no ties); the figures inspector, which ranked no pool, on 75.0 %.")
    ranked = dataclasses.replace(with_rates(rates), training_scorer="inspector")
    assert headline(ranked).endswith("no ties); the figures inspector on 75.0 %.")  # it may have ranked the pools
    public = dataclasses.replace(with_rates(rates), config=sd15("target", "prompts.txt"))
    assert "weight 1.0, PickScore prefers" in headline(public) and "inspector" not in headline(public)


def test_headline_without_a_rate():
    assert "apart on none of 512 held-out prompts" in headline(with_rate(0, 0, 512))


@pytest.mark.parametrize(("counts", "words"), [
    ((310, 196, 6), "above 50 %"), ((50, 50, 0), "contains 50 %"), ((196, 310, 6), "below 50 %"),
    ((5, 0, 0), "contains 50 %"),  # all five won, yet the exact interval starts at 0.025 ** (1 / 5) = 0.478
    ((0, 0, 9), "no win rate"),
])
def test_reading_follows_the_interval(counts, words):
    assert words in read_interval(with_rate(*counts))


def test_reading_warns_when_the_scorer_ranked_the_pairs():
    assert "not what people prefer" in read_interval(with_rate(3, 2, 1))
    assert "not what people prefer" not in read_interval(with_rate(3, 2, 1, name="aesthetic"))


def test_numbers_and_sections_are_on_the_page():
    page = Page(render_report(FULL))
    for words in ("310", "LAION aesthetic", "24,000", "1 h 7 min", "1 min 1 s", "−1.70°", "1.23 %", "not defined",
                  "2030-01-02 03:04 UTC", "What to keep in mind", "Worst losses", "no pair: not used",
                  "Supervised fine-tuning", '"lambda_stat"', "LoRA", "Pool images"):
        assert words in page.text, words


def test_intervals_defects_and_warnings_are_on_the_page():
    text = Page(render_report(FULL)).text
    for words in ("−90.0° to +60.0°", "+0.667", "Defective images", "100.0 %", "−50.0 points", "+0.50 % to +2.00 %",
                  "nearly cancel out", "0.02 and 0.03", "used in training", "sign test",
                  "changed by −12.3\u00a0%", "Collapse: a man", "Rise of the error", "its score by PickScore"):
        assert words in text, words
    # a warning is the first thing under the headline, the rate in the paper's shape before its counts
    assert text.index("Collapse") < text.index("How often") < text.index("vs. target") < text.index("sign test")


def test_a_sweep_shows_every_weight_with_its_intervals():
    point = dataclasses.replace(
        COMPARISON, win_rates={"pickscore": WinRate.from_counts(30, 10, 0)}, lora_weight=0.25,
        defects={"pickscore": defect_change([[1.0], [-1.0]], [[-1.0], [-1.0]], 0.0)},
        colour_change=ColourChange(NONE, NONE, Estimate(-0.5, -1.0, 0.0), NONE, 0.02, 0.03),
        variety_change=Estimate(-3.0, -5.0, -1.0))
    heavier = dataclasses.replace(point, lora_weight=1.0, win_rates={"pickscore": WinRate.from_counts(36, 4, 0)})
    page = Page(render_report(dataclasses.replace(FULL, sweep=[point, heavier])))
    for words in ("LoRA weight", "75.0 %", "90.0 %", "−3.0 %", "−5.0 % to −1.0 %", "Defective by PickScore"):
        assert words in page.text.replace("\xa0", " "), words
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert any("0.25: 75.0 %, 1: 90.0 %" in label for label in labels)
    assert "LoRA weight</h2>" not in render_report(FULL)


def test_latent_distances_are_plotted_against_the_rank():
    distances = np.stack([np.linspace(0.01, 0.05, 19), np.full(19, 0.004)], axis=-1)[None].repeat(3, axis=0)
    page = Page(render_report(dataclasses.replace(FULL, rank_distances=distances)))
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert any("Channel means over the rank, smoothed: means from 0.01 to 0.05" in label for label in labels)
    assert "over 3 pools" in page.text
    assert "Latent statistics" not in render_report(FULL)
    assert "Latent statistics" not in render_report(dataclasses.replace(FULL, rank_distances=np.zeros((0, 19, 2))))


def test_an_interval_chart_keeps_inside_its_frame():
    points = [("0.5", Estimate(0.4, 0.3, 0.55)), ("1", Estimate(0.9, None, None)), ("2", Estimate(None, None, None))]
    drawn = interval_chart("PickScore", "by weight", points, baseline=0.5)
    centres = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(centres) == 2 and centres[0][1] > centres[1][1]  # higher is better, and drawn higher
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in centres)
    assert drawn.count('class="whisker"') == 1 and 'class="baseline"' in drawn
    assert interval_chart("PickScore", "by weight", [], baseline=0.5) == ""


def test_the_other_scorers_are_named_with_their_verdicts():
    rates = {"pickscore": WinRate.from_counts(310, 196, 6), "hps_v2.1": WinRate.from_counts(70, 30, 0),
             "clip": WinRate.from_counts(30, 70, 0), "inspector": WinRate.from_counts(50, 50, 0),
             "aesthetic": WinRate.from_counts(0, 0, 9)}
    reading = read_interval(with_rates(rates))
    assert reading.endswith("Of the other judges, HPS v2.1 finds it better; CLIP finds it worse; Inspector and "
                            "LAION aesthetic find it neither surely better nor surely worse.")
    assert "other judges" not in read_interval(with_rate(3, 2, 1))


def test_several_images_per_prompt_are_mentioned_where_they_matter():
    several = with_comparison(
        FULL, images_per_prompt=4, win_rate_intervals={"pickscore": Interval(0.55, 0.66), "aesthetic": None})
    text = Page(render_report(several)).text
    for words in ("mean over its 4 images", "The first of a prompt's 4 images is shown", "55.0–66.0 %"):
        assert words in text, words
    assert "Bootstrap over prompts" not in Page(render_report(FULL)).text


def test_a_model_without_a_lora_has_no_weight():
    plain = with_comparison(with_rate(3, 1, 0), lora_weight=None)
    assert headline(plain).startswith("The figures judge prefers the tuned model on 75.0 %")
    text = Page(render_report(plain)).text.split("Win rates")[1].split("How to repeat")[0]
    assert "LoRA" not in text and "weight" not in text.split("Colours")[0]


def test_scorers_have_their_titles():
    rates = {scorer.name: WinRate.from_counts(3, 1, 0) for scorer in sd15("a/b", "p.txt").evaluation.scorers}
    text = Page(render_report(with_rates(rates))).text
    assert all(title in text for title in ("PickScore", "HPS v2.0", "ImageReward", "LAION aesthetic", "CLIP"))


def test_the_command_is_on_the_page():
    assert "hgdpo run --root '/a b'" in Page(render_report(EMPTY)).text


# --- that it is self-contained


def test_page_is_wellformed_and_loads_nothing():
    html = render_report(FULL)
    page = Page(html)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert "default-src 'none'" in html and "url(" not in html and "@import" not in html
    assert len(page.all("img")) == 2 + 8 + 5  # the first pair is at the top too
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/webp;base64,")
        assert image["alt"] and image["width"] == image["height"] == "64"
    contents = [a["href"] for a in page.all("a") if (a["href"] or "").startswith("#")]
    assert contents == ["#" + (part["id"] or "") for part in page.all("section")] and len(contents) == 16
    assert [a["href"] for a in page.all("a") if a["href"] not in contents] == ["https://example.org/a?b=1&c=2"]


def test_markup_in_text_stays_text():
    page = Page(render_report(FULL))
    assert page.text.count(EVIL) >= 6  # title, heading, warning, note, pair, pool
    assert any(EVIL in (image["alt"] or "") for image in page.all("img"))


def test_page_is_readable_by_screen_readers():
    page = Page(render_report(FULL))
    tags = [tag for tag, _ in page.tags]
    assert page.all("html")[0]["lang"] == "en"
    assert tags.count("h1") == tags.count("main") == 1
    assert tags.count("caption") == tags.count("table") == 7  # rates, tally, scores, defects, colours, times, locations
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    for drawing in page.all("svg"):
        assert drawing.get("aria-hidden") or (drawing["role"] == "img" and drawing["aria-label"])


def luminance(colour: str) -> float:
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark():
    roots = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", root)) for root in roots]
    assert len(themes) == 2
    for theme in themes:
        for text in ("ink", "faint", "accent", "loss"):
            light, dark = sorted((luminance(theme[text]), luminance(theme["page"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, theme)  # WCAG 2.2 AA


def test_an_empty_run_has_a_page():
    page = Page(render_report(EMPTY))
    assert not page.all("img") and "How to repeat" in page.text
    for title in ("Warnings", "Side by side", "Defective images", "Variety", "LoRA weight", "Counts", "Timings"):
        assert title not in re.findall("<h2>(.*?)</h2>", render_report(EMPTY)), title


# --- images and size


def test_tiny_images_keep_their_pixels_and_large_ones_shrink():
    def decode(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode_data_uri(Image.fromarray(pixels), 224, 60)), pixels)
    large = make_image(1, (704, 1024))
    assert decode(encode_data_uri(large, 640, 85)).size == (440, 640)
    assert large.size == (704, 1024)  # the caller's image is untouched


def test_images_shrink_until_the_page_fits(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (512, 384, 3), dtype=np.uint8)
    pair = PairSample("noise", Image.fromarray(noise), Image.fromarray(noise), 1.0, 2.0)
    data = dataclasses.replace(EMPTY, pairs=[pair])
    best = len(render_report(data).encode())
    monkeypatch.setattr(report_page, "MAX_BYTES", best)
    assert len(render_report(data).encode()) < best
    monkeypatch.setattr(report_page, "MAX_BYTES", 10_000)
    with pytest.raises(InputError, match="fewer pairs or pools"):
        render_report(data)


def test_a_long_run_stays_light():
    data = dataclasses.replace(EMPTY, training_log=sample_log(6_250))
    assert len(render_report(data)) < 250_000


# --- charts


def test_smoothing_is_a_centred_mean_with_shrinking_ends():
    values = np.arange(100.0)
    np.testing.assert_allclose(smooth(values)[2:-2], values[2:-2])  # a straight line stays straight
    assert smooth(values)[0] == pytest.approx(1.0)  # mean of 0, 1, 2
    np.testing.assert_array_equal(smooth(np.array([3.0, 7.0])), [3.0, 7.0])  # too short to smooth


def test_values_that_are_not_finite_are_left_out_and_counted():
    log = [*sample_log(3), {"step": 4.0, "loss": math.nan, "dpo_loss": math.inf}]
    line = read_line(log, "loss")
    assert line is not None and line.steps.tolist() == [1, 2, 3]
    assert read_line(log, "absent") is None and line_chart(ChartSpec("A", ("absent",), "-"), log) == ""
    text = Page(render_report(dataclasses.replace(EMPTY, training_log=log))).text
    assert "1 row held values that are not finite" in text


@pytest.mark.parametrize("values", [[1e-5] * 4, [0.0], [-3.0, 1e9], [0.5, 0.5000001], [1e-300, 2e-300]])
def test_charts_draw_any_range_inside_their_frame(values):
    log = [{"step": float(i), "x": value} for i, value in enumerate(values)]
    chart = line_chart(ChartSpec("X & Y", ("x",), "<meaning>", baseline=0.1), log)
    Page(chart)
    points = [float(n) for run in re.findall(r'points="([^"]+)"', chart) for n in re.split("[ ,]", run)]
    assert points and all(0 <= n <= 360 for n in points)


def test_bar_shows_rate_and_interval_where_they_belong():
    bar = rate_bar(WinRate(0.6, 60, 40, 0, 100, 0.5, 0.7))
    assert 'width="60.00"' in bar and "M50.00 12H70.00" in bar
    assert "whisker" not in rate_bar(WinRate.from_counts(0, 0, 3))


def test_a_fraction_is_a_bar_of_its_own_colour():
    assert 'class="rate-bar target"' in fraction_bar(0.25, "target") and 'width="25.00"' in fraction_bar(0.25, "target")


@pytest.mark.parametrize("spec", HISTOGRAMS, ids=lambda spec: spec.channel)
def test_histograms_draw_both_models_inside_their_frame(spec):
    drawn = histogram(spec, histograms(1), histograms(2))
    Page(drawn)
    numbers = [float(n) for path in re.findall(r' d="([^"]+)"', drawn) for n in re.findall(r"-?[0-9.]+", path)]
    assert numbers and all(0 <= n <= 360 for n in numbers)
    assert "0.0 % moved" in histogram(spec, histograms(1), histograms(1))
    assert 'aria-label="' in histogram(spec, ColourHistograms(), ColourHistograms())  # no image at all


def test_histogram_says_how_many_pixels_moved():
    red, blue = ColourHistograms(), ColourHistograms()
    for colours, rgb in ((red, (255, 0, 0)), (blue, (0, 0, 255))):
        colours.update(*rgb_to_hsv(np.full((2, 2, 3), rgb, dtype=np.uint8)))
    assert "100.0 % moved" in histogram(HISTOGRAMS[0], red, blue)
    assert "0.0 % moved" in histogram(HISTOGRAMS[2], red, blue)


def test_counts_before_are_an_area_and_now_a_line():
    drawn = Page(count_chart("Scores", "by <score>", (-1, 1), [0, 3], [2, 1]))
    top, third = TOP, BOTTOM + (TOP - BOTTOM) / 3
    area, line = (attributes["d"] for attributes in drawn.all("path"))
    middle = (LEFT + RIGHT) / 2
    assert area == f"M{LEFT} {BOTTOM}V{BOTTOM:.1f}H{middle:.1f}V{top:.1f}H{RIGHT:.1f}V{BOTTOM}H{LEFT}Z"
    assert line == f"M{LEFT} {BOTTOM}V{2 * third - BOTTOM:.1f}H{middle:.1f}V{third:.1f}H{RIGHT:.1f}"
    assert "by <score>" in drawn.text and "at most 3 in a bin" in str(drawn.all("svg")[0]["aria-label"])
    single = Page(count_chart("Kendall's tau", "", (-1, 1), [0, 1]))
    assert [attributes["class"] for attributes in single.all("path")] == ["area"]
    assert "0.5" not in single.text and single.text.endswith("-101")  # values 0 and 1 alone, then the ends and 0


def test_numbers_keep_their_sign_and_intervals_do_not_look_like_one():
    assert [signed(v, 2) for v in (1.234, -0.5, -0.001, 0.0)] == ["+1.23", "−0.50", "0.00", "0.00"]
    assert span(0.5, 0.7, lambda end: f"{end:.1f}") == "0.5–0.7"
    assert span(-0.5, 0.7, lambda end: signed(end, 1)) == "−0.5 to +0.7"
    assert span(None, 1.0, str) == "–"
    assert [p_value(p) for p in (1.0, 0.049, 0.00012, 1e-9)] == ["1.00", "0.049", "0.00012", "<0.0001"]


def test_numbers_are_short():
    assert [format_number(v) for v in (0, 0.693147, 12_000, 1e-5, -1.82e-4, 250, 2.5e-7)] == [
        "0", "0.693", "12,000", "1e-5", "-1.82e-4", "250", "2.5e-7"]
