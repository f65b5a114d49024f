"""Prompts from data sets and remote addresses, and the files that people really have."""

import builtins
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hgdpo_core.config import PromptSource
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import build_config
from hgdpo_core.errors import ConfigError, InputError, StorageError
from hgdpo_core.prompts import read_prompts
from hgdpo_core.storage import Store


def parti() -> Path:
    """The real list, which the project does not carry."""
    found = next((folder / "shared/data/PartiPrompts.tsv" for folder in Path(__file__).parents
                  if (folder / "shared/data/PartiPrompts.tsv").exists()), None)
    if found is None:
        pytest.skip("shared/data/PartiPrompts.tsv is not here")
    return found


def read(path, store=None, **settings):
    return read_prompts(PromptSource(source=str(path), **settings), store)


# -- files


def test_parti_prompts():
    people = read(parti(), column="Prompt", category="People")
    assert len(people.prompts) == 177 and people.describe() == "177 prompts; dropped 1455 of another category"
    everything = read(parti(), column="Prompt").prompts
    assert any(prompt.startswith('"G I G G L E" painted') for prompt in everything)  # its quotes are text


def test_a_tsv_quoted_like_csv_is_unquoted(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\tn\n"a ""red"" top"\t1\n"two\nlines"\t2\n')
    assert read(tmp_path / "a.tsv").prompts == ('a "red" top', "two\nlines")


def test_parquet_reads_no_other_column(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "category": ["People", "Cats"], "image": [b"x" * 10, b"y" * 10]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", category="People").prompts == ("a",)
    with pytest.raises(InputError, match="no prompt column: expected 'x', got prompt, category, image"):
        read(tmp_path / "a.parquet", column="x")


@pytest.mark.parametrize(("content", "message"), [
    ("a\nb\ncaf\u00e9 noir\n".encode("latin-1"),
     r"not UTF-8 text: byte 7 \(line 3\) is 0xe9; .*iconv -f LATIN1 -t UTF-8"),
    ("\ufeffa\n".encode() + b"\xe9", r"byte 5 \(line 2\) is 0xe9"),
    ("a woman".encode("utf-16"), "UTF-16 text .*iconv -f UTF-16"),
])
def test_other_encodings_are_named_with_the_way_out(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "a.txt")
    assert "\n" not in str(error.value)


def test_ten_thousand_characters_are_taken_and_said(tmp_path):
    (tmp_path / "a.txt").write_text("short\n" + "x" * 10_000 + "\n")
    found = read(tmp_path / "a.txt")
    assert len(found.prompts[1]) == 10_000
    assert "1 of over 2000 characters, the longest 10000: a plain prompt is cut" in found.describe()


def test_a_cell_beyond_what_csv_allows_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    with pytest.raises(InputError, match="cannot be read as a table: field larger"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("row", ["a dancer, golden dress", 'a "red" top, a hat', "a,,"])
def test_a_row_of_more_cells_than_the_header_is_refused_and_never_cut(tmp_path, row):
    (tmp_path / "a.csv").write_text(f"prompt\na man\n{row}\n")
    with pytest.raises(InputError, match=r'line 3 of .*a\.csv has \d cells, its header has 1: .*"double quotes"'):
        read(tmp_path / "a.csv")
    (tmp_path / "a.tsv").write_text("prompt\tn\na man\t1\ta woman\n")
    with pytest.raises(InputError, match="line 2 of .* has 3 cells, its header has 2"):
        read(tmp_path / "a.tsv")


@pytest.mark.parametrize(("text", "message"), [
    ('prompt\n"a man\na woman\n', "cannot be read as a table: unexpected end of data"),
    ('prompt\n"a" man\n', "cannot be read as a table"),
    ("prompt,prompt\na,b\n", "names a column twice"),
])
def test_a_table_that_would_be_read_wrongly_is_refused(tmp_path, text, message):
    """An opening quote without its end would make one prompt of all that follow."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_pipe_without_a_writer_is_refused(tmp_path, address):
    """It would be waited for without end."""
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="cannot be read: .*a pipe is in the place of a file"):
        read(address.format(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "\\ud800"}', '{"prompt": ' + "1" * 5000 + "}"])
def test_json_that_python_chokes_on_is_one_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a man"}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 of .* is not JSON") as error:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)


def test_damaged_parquet_is_one_line_or_whole(tmp_path):
    pq.write_table(pa.table({"prompt": [f"a woman number {i}" for i in range(200)]}), tmp_path / "a.parquet")
    whole, refused = (tmp_path / "a.parquet").read_bytes(), 0
    for at in range(0, len(whole), 23):
        (tmp_path / "a.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
        try:
            read(tmp_path / "a.parquet")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


@pytest.mark.parametrize("limit", [None, 1, 2, 9])
def test_every_row_is_used_or_counted(tmp_path, limit):
    rows = ["a,People", "b,People", "a,People", ",People", "c,Cats", "d,Dogs"]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,Category", *rows]) + "\n")
    found = read(tmp_path / "a.csv", category="People", limit=limit)
    dropped = len(found.duplicates) + found.empty + found.other_category + found.beyond_limit
    assert len(found.prompts) + dropped == len(rows) and found.other_category == 2 and found.empty == 1
    assert found.beyond_limit == (1 if limit == 1 else 0)
    assert "1 empty and 1 duplicate (the first: 'a') and 2 of another category" in found.describe()


# -- data sets


def test_a_folder_is_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    pq.write_table(pa.table({"text": ["a", "b", "a", ""], "n": [1, 2, 3, 4]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["c"], "n": [1]}), tmp_path / "test.parquet")
    found = read(tmp_path)
    assert found.prompts == ("a", "b") and found.empty == 1 and found.duplicates == ("a",)
    assert read(tmp_path, limit=1).prompts == ("a",)
    assert read(tmp_path, split="test").prompts == ("c",)
    with pytest.raises(InputError, match="the data set .* cannot be read: .*nope"):
        read(tmp_path, split="nope")
    with pytest.raises(InputError, match="no prompt column: expected 'x', got text, n"):
        read(tmp_path, column="x")
    saved = tmp_path / "saved"
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"caption": ["d"]})}).save_to_disk(saved)
    assert read(saved, split="validation").prompts == ("d",)
    with pytest.raises(InputError, match="it has no split 'train'; it has validation"):
        read(saved)


def test_a_hub_id_out_of_reach_names_both_readings(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(StorageError, match="owner/prompts is not a file or folder here, and as a data set of"):
        read("owner/prompts", Store(str(tmp_path)))


def test_without_the_package_one_line_names_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs the package datasets: pip install 'hgdpo\[datasets\]'"):
        read(tmp_path)


# -- remote addresses


def test_a_remote_list_is_kept_and_serves_when_its_source_is_gone(tmp_path):
    store, memory = Store(str(tmp_path)), fsspec.filesystem("memory")
    memory.pipe("/lists/prompts.txt", b"a\n\na\nb\n")
    first = read("memory://lists/prompts.txt", store)
    assert first.prompts == ("a", "b") and first.remark == ""
    memory.pipe("/lists/prompts.txt", b"c\n")
    assert read("memory://lists/prompts.txt", store).prompts == ("c",)  # what is there now counts
    memory.rm("/lists/prompts.txt")
    again = read("memory://lists/prompts.txt", store)
    assert again.prompts == ("c",)
    assert "from the copy in file://" in again.describe() and "there is no prompt file" in again.describe()
    with pytest.raises(StorageError, match="there is no prompt file at memory://lists/prompts.txt"):
        read("memory://lists/prompts.txt", Store(str(tmp_path / "other")))


def test_a_list_over_http(tmp_path):
    (tmp_path / "people.tsv").write_text("Prompt\tCategory\na cook\tPeople\na cat\tAnimals\n")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, store = f"http://127.0.0.1:{server.server_port}", Store(str(tmp_path / "root"))
    try:
        assert read(f"{address}/people.tsv", store, category="People").prompts == ("a cook",)
        with pytest.raises(StorageError, match="there is no prompt file at http"):
            read(f"{address}/nothing.tsv", store)
    finally:
        server.shutdown()
        server.server_close()
    assert "from the copy in" in read(f"{address}/people.tsv", store, category="People").remark


@pytest.mark.parametrize("address", [
    "https://me:secret@host/p.txt", "https://host/p.txt?X-Amz-Date=1&X-Amz-Signature=secret",
    "https://host/p.txt?access_token=secret", "https://host/p.txt?api_key=secret",
    "https://host/p.txt?X-Amz-Security-Token=secret", "https://host/p.txt?api-key=secret",
    "https://host/p.txt?access-token=secret", "https://host/p.txt?password=secret", "https://secret@host/p.txt",
    "https://host/p.txt?a=1%26token%3Dsecret", "https://host/p.txt#access_token=secret", "https://secret%40host/p.txt",
    "https://[secret/p.txt",
])
def test_an_address_with_a_secret_is_refused_without_quoting_it(address):
    with pytest.raises(InputError, match="holds a password, key or signature") as error:
        read(address)
    assert "secret" not in str(error.value)


def test_a_file_url_with_a_host_is_refused():
    with pytest.raises(InputError, match="file://data/p.txt names the host data, not a folder: write file:///data"):
        read("file://data/p.txt")


# -- settings


def test_presets_state_how_prompts_are_written():
    sd15 = build_config("sd15", target="a/b", prompts="p.txt")
    assert (sd15.target.prompt_syntax, sd15.evaluation.prompt_syntax) == ("a1111", "plain")
    assert build_config("figures").target.prompt_syntax == "plain"
    with pytest.raises(ConfigError, match="split is 'dev', but the figures setting has train, validation, test"):
        apply_overrides(build_config("figures"), {"prompts.split": "dev"})


def test_a_prompt_that_cannot_be_read_stops_a_run_before_it_starts(tmp_path, target_folder, judge_folder):
    from hgdpo_core.run import open_run

    (tmp_path / "p.txt").write_text("fine\n(word:1.2.3)\n")
    (tmp_path / "e.txt").write_text("other\n")
    overrides = {"evaluation.prompts.source": str(tmp_path / "e.txt"), "evaluation.prompts.column": None,
                 "evaluation.prompts.category": None, "scorer.source": str(judge_folder),
                 "evaluation.scorers": [{"source": str(judge_folder)}]}
    options = {"prompts": str(tmp_path / "p.txt"), "target": str(target_folder), "overrides": overrides}
    with pytest.raises(InputError, match="has the weight 1.2.3"):
        open_run("sd15", str(tmp_path / "root"), **options)
    (tmp_path / "p.txt").write_text("fine\n(word:1.2)\n")
    with pytest.raises(InputError, match="has the weight 9.9.9"):
        open_run("sd15", str(tmp_path / "root"), **options | {"overrides": overrides | {
            "target.negative_prompt": "(bad:9.9.9)"}})
    assert open_run("sd15", str(tmp_path / "root"), **options).target.prompt_syntax == "a1111"
