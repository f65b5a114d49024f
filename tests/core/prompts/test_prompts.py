"""Prompts: ids and seeds that never change, files as people keep them, mistakes in one line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hgdpo_core.config import PromptSource
from hgdpo_core.errors import InputError
from hgdpo_core.prompts import clean_prompts, image_seed, load_prompts, prompt_id, read_prompts, save_prompts
from hgdpo_core.storage import Store

WOMAN = "a woman in a red top"


@pytest.mark.parametrize(("run_seed", "prompt", "index", "expected"), [
    # printf '%s\0%s\0%s' RUN_SEED PROMPT INDEX | sha256sum, first 16 hex digits, halved by bc.
    (0, WOMAN, 0, 7901218248008925769),
    (0, WOMAN, 19, 6266487260087642140),
    (7, "東京の女性 🎎", 3, 7583075576819560632),
])
def test_golden_seeds(run_seed, prompt, index, expected):
    assert image_seed(run_seed, prompt, index) == expected


def test_golden_prompt_ids():
    # printf '%s' PROMPT | sha256sum, first 16 hex digits.
    assert prompt_id(WOMAN) == "41bac64a76240228"
    assert prompt_id("東京の女性 🎎") == "9993876babe9658c"


def test_text_is_kept_exactly_and_drops_are_reported(tmp_path):
    path = tmp_path / "prompts.txt"
    text = "  leading and trailing  \n\na, (bust shot:1.2)\r\n  leading and trailing  \n8k\u2028 wide\n"
    path.write_bytes(text.encode())
    prompts = read_prompts(PromptSource(source=str(path)))
    assert prompts.prompts == ("  leading and trailing  ", "a, (bust shot:1.2)", "8k\u2028 wide")
    assert prompts.describe() == "3 prompts; dropped 1 empty and 1 duplicate (the first: '  leading and trailing  ')"


def test_the_last_line_break_is_no_empty_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\n")
    assert read_prompts(PromptSource(source=str(path))).empty == 0


def test_every_format_gives_the_same_prompts(tmp_path):
    texts = ["a, \"quoted\" woman", "two\nlines", "плащ"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"caption": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('n,prompt\n1,"a, ""quoted"" woman"\n2,"two\nlines"\n3,плащ\n')
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert read_prompts(PromptSource(source=str(tmp_path / name))).prompts == tuple(texts), name


def test_category_and_limit(tmp_path):
    path = tmp_path / "parti.tsv"
    path.write_text("Prompt\tCategory\na dog\tAnimals\na nurse\tPeople\na cook\tPeople\n")
    source = PromptSource(source=str(path), category="People")
    assert read_prompts(source).prompts == ("a nurse", "a cook")
    assert read_prompts(source.model_copy(update={"limit": 1})).prompts == ("a nurse",)
    with pytest.raises(InputError, match="no row of category 'Cats'; it has Animals, People"):
        read_prompts(source.model_copy(update={"category": "Cats"}))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", b"", "holds no prompt"),
    ("blank.txt", b"\n \n", "holds no prompt"),
    ("image.png", b"\x89PNG", "not a prompt file"),
    ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
    ("binary.txt", b"a\0b", "binary file"),
    ("broken.jsonl", b"{nope", "line 1 of .* is not JSON"),
    ("broken.parquet", b"PAR1", "not a Parquet file"),
    ("columns.csv", b"x,y\n1,2\n", "no prompt column: expected one of prompt"),
    ("numbers.jsonl", b'{"prompt": 3}\n', "not text: 3"),
    ("long.txt", b"x" * 20_000, "20000 characters"),
])
def test_unusable_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(PromptSource(source=str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no prompt file at .*nowhere.txt"):
        read_prompts(PromptSource(source=str(tmp_path / "nowhere.txt")))


def test_the_id_follows_the_texts_and_the_store_keeps_them(tmp_path):
    store = Store(str(tmp_path))
    prompts = clean_prompts(["a", "b "])
    assert prompts.id != clean_prompts(["b ", "a"]).id
    assert load_prompts(store, save_prompts(store, prompts)).prompts == ("a", "b ")
