"""A1111's weights: cases worked by hand, its own documented examples, the paper's prompts."""

from pathlib import Path

import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.prompts.syntax import check_syntax, describe_unread, parse_weights, strip_syntax

PAPER = (Path(__file__).parents[2] / "golden" / "paper_prompts.txt").read_text().splitlines()
DOWN = 1 / 1.1


def parsed(text):
    """[(text, weight)] of a prompt without a BREAK, weights rounded to 9 places."""
    (part,) = parse_weights(text)
    return [(segment.text, round(segment.weight, 9)) for segment in part]


@pytest.mark.parametrize(("text", "expected"), [
    # The examples of the docstring of A1111's parse_prompt_attention.
    ("normal text", [("normal text", 1)]),
    ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
      ("sky", 1.1**4), (".", 1.1)]),
    # Worked by hand from the same rules.
    ("[words]", [("words", DOWN)]),
    ("[[words]]", [("words", DOWN**2)]),
    ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
    ("(long wavy hair: 1.2)", [("long wavy hair", 1.2)]),  # a space as in the paper's Figure 11
    ("(a:1.2 )", [("a", 1.2)]),
    ("(a:-1)", [("a", -1)]),
    ("(a:.5)", [("a", 0.5)]),
    ("(time 10:30)", [("time 10", 30)]),  # as A1111 reads it; \( is the way out
    (r"(time 10:30\)", [("time 10:30)", 1.1)]),
    ("(a:+)", [("a:+", 1.1)]),  # without a digit or a point it is text
    ("ratio 16:9", [("ratio 16:9", 1)]),
    ("a:1.2) b", [("a:1.2) b", 1)]),  # nothing is open: text
    ("a) b] c", [("a) b] c", 1)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * DOWN), (" c", DOWN)]),  # the kinds of brackets do not know each other
    ("[a:1.2]", [("a:1.2", DOWN)]),  # only round brackets take a number
    (r"back\slash \\ end", [("backslash \\ end", 1)]),
    (r"\((smile:1.3)\)", [("(", 1), ("smile", 1.3), (")", 1)]),
    ("", []),
    ("()", []),
    ("a<lora:style:0.8>b", [("ab", 1)]),
    ("a <3 b> c", [("a <3 b> c", 1)]),
])
def test_golden_cases(text, expected):
    segments = [(words, round(weight, 9)) for words, weight in expected]
    assert [segment for segment in parsed(text) if segment[0]] == segments


def test_break_begins_a_new_part_also_inside_brackets():
    assert [[segment.text for segment in part] for part in parse_weights("a BREAK b,\nBREAK  c")] == [["a"], ["b,"],
                                                                                                      ["c"]]
    inside = parse_weights("(a BREAK b:1.5)")
    assert [[tuple(segment) for segment in part] for part in inside] == [[("a", 1.5)], [("b", 1.5)]]
    assert parsed("BREAKING news") == [("BREAKING news", 1)]


@pytest.mark.parametrize(("text", "words"), [
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", "a house on a hill, sun, sky."),
    (r"smile \(gentle\), [soft:light]", "smile (gentle), soft:light"),
    ("one BREAK two", "one two"),
    ("(bust shot:1.2), <lora:x:1> photo", "bust shot,  photo"),
])
def test_scorers_read_the_words_alone(text, words):
    assert strip_syntax(text, "a1111") == words
    assert strip_syntax(text, "plain") == text


@pytest.mark.parametrize("weight", ["1.2.3", ".", "9" * 400])
def test_a_weight_that_is_no_number_is_refused_in_one_line(weight):
    with pytest.raises(InputError, match="has the weight .*expected a number") as error:
        check_syntax(["fine", f"a\n(word:{weight})"], "a1111")
    assert "\n" not in str(error.value)
    check_syntax([f"(word:{weight})"], "plain")


def test_what_only_a1111_does_is_said():
    prompts = ["a <lora:x:0.5>", "[cat:dog:0.5]", "[red|blue] hat", "cat AND dog", "(fine:1.2) [less] SAND"]
    remark = describe_unread(prompts, "a1111")
    assert remark.startswith("1 of the prompts with networks") and "3 of the prompts with [a:b:0.5]" in remark
    assert remark.endswith("what A1111 calls Clip skip 2 is target.clip_skip=1 here (Clip skip 1, its default, is "
                           "none): it counts as diffusers does")
    assert "1 of the prompts with a clip skip" in describe_unread(["a cat, Clip skip: 2"], "a1111")
    assert describe_unread(prompts[-1:], "a1111") == describe_unread(prompts, "plain") == ""


def test_the_papers_prompts():
    """16 under Figures 9-16, 9 in D.4 of arXiv:2405.20216v1; `$8 k$` there is a scanning slip for 8k."""
    assert len(PAPER) == len(set(PAPER)) == 25
    assert describe_unread(PAPER, "a1111") == ""
    for prompt in PAPER:
        words = strip_syntax(prompt, "a1111")
        assert not set(words) & set("()[]\\:"), prompt
        weights = {round(segment.weight, 9) for segment in parse_weights(prompt)[0]}
        assert weights <= {1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.83}, prompt
    assert parsed(PAPER[12])[-1] == ("bust shot", 1.2)
