"""Captioned images as people keep them: folders, webdataset tars, Parquet; on a disk, on S3, in memory."""

import csv
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_s3 import served_bucket
from PIL import Image

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets import expand_braces, locate_images, open_located_images, read_image_set
from hgdpo_core.image_sets import folders as image_folders
from hgdpo_core.image_sets import sets as image_sets
from hgdpo_core.image_sets import tars as image_tars
from hgdpo_core.models import fingerprints
from hgdpo_core.storage import Store


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def contents(images) -> list[tuple[str, str | None, bytes | str]]:
    with images.reader() as reader:
        data = [item for index in images.shards for item in reader.read(images.shard(index))]
    return list(zip(images.index["name"].to_pylist(), images.index["caption"].to_pylist(), data, strict=True))


def captions(images) -> dict[str, str | None]:
    return dict(zip(images.index["name"].to_pylist(), images.index["caption"].to_pylist(), strict=True))


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Two images of the root, two of a subfolder."""
    location = tmp_path / "images"
    (location / "sub").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.png", "sub/a.png", "sub/c.jpg"]):
        (location / name).write_bytes(image_bytes(number, "JPEG" if name.endswith("jpg") else "PNG"))
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"},
             {"file_name": "sub/a.png", "text": "three"}, {"file_name": "gone.png", "text": "nobody"}]
    (location / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (location / "sub" / "c.txt").write_text(" four\n")
    return location


@pytest.fixture
def tars(tmp_path):
    """Two shards of three samples, text in .txt and in .json."""
    location = tmp_path / "tars"
    location.mkdir()
    write_tar(location / "set-000.tar", {
        "./0001.jpg": image_bytes(1, "JPEG"), "./0001.txt": b" first\n", "./0001.json": b'{"caption": "not this one"}',
        "deep/0001.webp": image_bytes(2, "WEBP"), "__key__": b"no sample",
        "deep/0001.json": b'{"url": "x", "caption": "second"}'})
    write_tar(location / "set-001.tar", {
        "0001.png": image_bytes(3), "0001.json": b"{broken", "0002.json": b'{"text": "no image"}',
        "._0001.jpg": b"what a Mac leaves"})
    return location


# -- folders


def test_the_id_of_a_folder_is_what_it_always_was(folder):
    """sha256 of every file with its bare name and caption, in the order of paths."""
    files = ["a.png", "b.png", "sub/a.png", "sub/c.jpg"]
    parts = [[name.split("/")[-1], hashlib.sha256((folder / name).read_bytes()).hexdigest(), caption]
             for name, caption in zip(files, ["one", "two", "three", "four"], strict=True)]
    images = read_image_set(str(folder))
    assert images.id == f"4-{content_hash(parts)}" == read_image_set(f"file://{folder}").id
    assert contents(images) == [(name, part[2], (folder / name).read_bytes())
                                for name, part in zip(files, parts, strict=True)]
    (folder / "sub" / "c.txt").write_text("a longer fourth")
    assert read_image_set(str(folder)).id != images.id


def test_metadata_may_be_csv_and_lie_in_subfolders(folder):
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], ["a.png", 'a "quoted", long\none'], ["b.png", "two"],
                                    ["sub/c.jpg", "never: the text beside counts more"]])
    (folder / "sub" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": null, "prompt": "three"}\n\n{"file_name": "./b.png", "text": "not there"}\n')
    assert captions(read_image_set(str(folder))) == {
        "a.png": 'a "quoted", long\none', "b.png": "two", "sub/a.png": "three", "sub/c.jpg": "four"}


def test_the_folders_own_metadata_counts_more_than_a_subfolders(folder):
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "other"}\n')
    assert captions(read_image_set(str(folder)))["sub/a.png"] == "three"


def test_images_of_one_stem_share_their_text(folder):
    (folder / "sub" / "c.png").write_bytes(image_bytes(9))
    assert captions(read_image_set(str(folder)))["sub/c.png"] == "four"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("metadata.jsonl", b'{"file_name": "a.png", "text": 5}', 'line 1 of .* is not {"file_name": …, "text": …}'),
    ("metadata.jsonl", b'{"file_name": "a.png", "txt": "one"}', "line 1 of"),
    ("metadata.jsonl", b'"a.png"', "line 1 of"),
    ("metadata.csv", b"file,text\na.png,one\n", "has no columns file_name and text or caption or prompt: it has file"),
    ("metadata.csv", b'file_name,text\na.png,"one\n', "cannot be read as a table: unexpected end of data"),
    ("metadata.csv", b"file_name,text\na.png,a dancer, golden dress\n", "line 2 of .* has 3 cells, its header has 2"),
    ("metadata.jsonl", b"[" * 100_000, "line 1 of"),
])
def test_broken_captions_are_one_line(folder, name, text, message):
    (folder / name).write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_image_set(str(folder))


@pytest.mark.parametrize(("data", "advice"), [("Mädchen".encode("latin-1"), "iconv -f LATIN1"),
                                              ("a portrait".encode("utf-16"), "iconv -f UTF-16")])
def test_one_caption_that_cannot_be_read_costs_its_image_only(folder, data, advice):
    (folder / "sub" / "c.txt").write_bytes(data)
    images = read_image_set(str(folder))
    assert captions(images)["sub/c.jpg"] is None and captions(images)["a.png"] == "one"
    assert advice in images.index["problem"][3].as_py() and images.index["problem"].null_count == 3


def test_what_lies_there_is_used_or_counted(folder, tmp_path):
    """Other kinds of images, linked folders, what a Mac leaves, pipes, loops, names that no store takes."""
    for name, kind in (("a.jfif", "JPEG"), ("b.avif", "AVIF"), ("c.tif", "TIFF"), ("d.gif", "GIF")):
        (folder / name).write_bytes(image_bytes(9, kind))
        (folder / name).with_suffix(".txt").write_text("a portrait")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.png").write_bytes(image_bytes(9))
    (tmp_path / "other" / "y.txt").write_text("linked")
    (folder / "more").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.png")
    (folder / "._a.png").write_bytes(b"\0\5")
    (folder / "x\\y.png").write_bytes(image_bytes(9))
    (folder / "movie.mp4").write_bytes(b"")
    (folder / "root").mkdir()
    (folder / "root" / "made.png").write_bytes(image_bytes(9))
    images = read_image_set(str(folder), leave_out=folder / "root")
    assert captions(images)["more/y.png"] == "linked" and len(images) == 4 + 4 + 1
    assert images.skipped == {
        "links to a folder above": 1, "links to nothing": 1, "pipes, sockets and devices": 1, "._ files of a Mac": 1,
        "names with a backslash (rename them)": 1, "the root of the results": 1, "files of the kind .mp4": 1}
    lying = [path for path in folder.rglob("*") if not path.is_dir() and path.name != "made.png"]
    linked, folders = ["more/y.png", "more/y.txt"], ["loop", "root"]
    assert len(lying) + len(linked) + len(folders) == len(images.files) + sum(images.skipped.values())
    assert "9 images; skipped: 1 " in images.describe()
    assert read_image_set(str(folder), leave_out=folder / "root") == images
    with pytest.raises(InputError, match="is the root of the results too: give another --root"):
        read_image_set(str(folder), leave_out=folder)


def test_only_sets_whose_pixels_changed_are_encoded_again(folder):
    assert not read_image_set(str(folder)).converted
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(folder / "a.png")
    assert read_image_set(str(folder)).converted


def test_a_few_images_may_lack_a_caption_but_not_most(folder):
    (folder / "sub" / "c.txt").write_text(" \n")
    images = read_image_set(str(folder))
    assert len(images) == 4 and captions(images)["sub/c.jpg"] == ""
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"4 of 4 images have no caption, the first is a\.png of .*`hgdpo caption"):
        read_image_set(str(folder))


def test_nothing_is_read_twice(folder, tars, monkeypatch):
    """By the command that checks its input, by the flow that it starts, and by the training."""
    hashed, opened = [], []
    read, decode, samples = fingerprints._sha256, image_folders.decode_text, image_tars._samples
    monkeypatch.setattr(fingerprints, "_sha256", lambda path: (hashed.append(path), read(path))[1])
    monkeypatch.setattr(image_folders, "decode_text", lambda *a: (opened.append(a), decode(*a))[1])
    monkeypatch.setattr(image_tars, "_samples", lambda *a: (opened.append(a), samples(*a))[1])
    first = read_image_set(str(folder)), read_image_set(str(tars))
    assert len(hashed) == 4 + 2 and len(opened) == 2 + 2
    assert (read_image_set(str(folder)), read_image_set(str(tars))) == first
    assert len(hashed) == 4 + 2 and len(opened) == 2 + 2
    (folder / "a.png").write_bytes(image_bytes(77) + b" ")
    assert read_image_set(str(folder)).id != first[0].id


def test_an_unusable_cache_costs_only_time(folder, tmp_path, monkeypatch):
    expected = read_image_set(str(folder))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_image_set(str(folder)) == expected


# -- tars


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/set-{000..001}.tar", "/set-{000,001}.tar", "/set-00[01].tar"])
def test_tars_by_folder_and_pattern(tars, pattern):
    images = read_image_set(f"{tars}{pattern}")
    assert images.kind == "tars" and len(images) == 3
    assert contents(images) == [("set-000.tar/0001.jpg", "first", image_bytes(1, "JPEG")),
                                ("set-000.tar/deep/0001.webp", "second", image_bytes(2, "WEBP")),
                                ("set-001.tar/0001.png", None, image_bytes(3))]
    assert images.id == read_image_set(str(tars)).id


def test_one_tar_and_its_id(tars):
    one = read_image_set(str(tars / "set-000.tar"))
    digest = hashlib.sha256((tars / "set-000.tar").read_bytes()).hexdigest()
    assert one.id == f"2-{content_hash([['set-000.tar', digest]])}"


def test_images_can_be_read_from_the_middle_and_backwards(tars):
    images = read_image_set(str(tars))
    with images.reader() as reader:
        assert [list(reader.read(images.index.slice(row, 1)))[0] for row in (2, 1, 0)] == [
            image_bytes(3), image_bytes(2, "WEBP"), image_bytes(1, "JPEG")]


def test_unusable_tars_are_one_line(tars):
    data = (tars / "set-001.tar").read_bytes()
    for broken in (data[:700], b"not a tar", b"\x1f\x8b" + data):
        (tars / "set-001.tar").write_bytes(broken)
        with pytest.raises(InputError, match=r"set-001\.tar is cut off or not a tar file: .*; get it again"):
            read_image_set(str(tars))
    (tars / "set-001.tar").unlink()
    with pytest.raises(InputError, match=r"nothing is called set-001\.tar at .*\{000\.\.001\}"):
        read_image_set(f"{tars}/set-{{000..001}}.tar")
    (tars / "set-000.tar").rename(tars / "set-000.tar.gz")
    with pytest.raises(InputError, match=r"set-000\.tar\.gz in .* is compressed.*unpack it"):
        read_image_set(str(tars))


@pytest.mark.parametrize("pattern", ["set-{000000000..999999999}.tar", "{0..999}{0..999}.tar"])
def test_braces_that_stand_for_too_many_files_are_one_line(pattern):
    with pytest.raises(InputError, match="expected at most 100000; give . instead"):
        expand_braces(pattern)


def test_braces_are_written_out():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_dots_in_the_names_of_a_tar(tmp_path):
    grey = {number: image_bytes(number) for number in range(7)}
    write_tar(tmp_path / "a.tar", {
        "look 1.5.png": grey[0], "look 1.5.txt": b"ivory dress", "look 1.7.png": grey[1], "look 1.7.txt": b"coral coat",
        "0001.png": grey[2], "0001.mask.png": grey[3], "0001.caption.txt": b"whole sample", "hat 2.5.png": grey[4],
        "hat 2.7.txt": b"not this one", "3.png": grey[5], "3.txt": "café".encode("latin-1"), "3.cls": b"7"})
    images = read_image_set(str(tmp_path))
    assert contents(images) == [("a.tar/look 1.5.png", "ivory dress", grey[0]),
                                ("a.tar/look 1.7.png", "coral coat", grey[1]),
                                ("a.tar/0001.png", "whole sample", grey[2]),
                                ("a.tar/hat 2.5.png", None, grey[4]), ("a.tar/3.png", None, grey[5])]
    assert images.skipped == {"images of tars beside another of their sample": 1,
                                  "members of tars of the kind .cls": 1}


# -- Parquet


def test_parquet_as_the_datasets_library_writes_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    for number in range(2):
        rows = {"text": [f"caption {number}-{row}" for row in range(3)],
                "image": [{"bytes": image_bytes(10 * number + row), "path": None} for row in range(3)]}
        features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"part-{number}.parquet")
    images = read_image_set(str(tmp_path / "set"))
    assert images.kind == "parquet" and len(images) == 6
    assert contents(images)[4] == ("part-1.parquet#1", "caption 1-1", image_bytes(11))


@pytest.mark.parametrize("rows_a_group", [4, 1000])
def test_rows_are_read_from_anywhere_without_the_rest(tmp_path, rows_a_group):
    table = pa.table({"jpg": [image_bytes(row, "JPEG") for row in range(40)], "caption": ["a woman"] * 40})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_a_group)
    images = read_image_set(str(tmp_path / "a.parquet"))
    with images.reader() as reader:
        for row in (0, 1, 2, 17, 18, 5, 39):
            assert list(reader.read(images.index.slice(row, 1))) == [table["jpg"][row].as_py()]


def test_rows_without_bytes_have_a_reason(tmp_path):
    values = [{"bytes": None, "path": "/home/them/1.jpg"}, {"bytes": None, "path": None}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(values, kind), "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    with (images := read_image_set(str(tmp_path))).reader() as reader:
        reasons = list(reader.read(images.index))
    assert reasons == ["its row holds no bytes, only the path /home/them/1.jpg: embed the images in the file",
                       "its row holds no image", "its row holds no image"]


@pytest.mark.parametrize(("columns", "message"), [
    ({"image": ["1.jpg"], "text": ["a"]}, r"no column of images: expected image, img, .* got image \(string\)"),
    ({"image": [b"1"], "url": ["a"]}, r"no column of captions: expected text or caption or prompt as text, got image"),
    ({"image": [b"1"], "text": [5]}, "no column of captions"),
])
def test_unusable_columns_are_one_line(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        read_image_set(str(tmp_path))


def test_a_cut_off_table_is_one_line(tmp_path):
    pq.write_table(pa.table({"image": [b"1"], "text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is cut off or no Parquet file: .*; get it again"):
        read_image_set(str(tmp_path))


# -- places


@pytest.fixture(scope="module")
def server():
    with served_bucket() as server:
        yield server


@pytest.mark.parametrize(("root", "location"), [("s3://bucket", "tars/set-{000..001}.tar"), ("memory://", "tars"),
                                             ("memory://", "images")])
def test_a_bucket_is_as_good_as_a_disk(server, folder, tars, tmp_path, root, location):
    bucket = Store(f"{root}/{tmp_path.name}".replace(":///", "://"))
    for name in ("images", "tars"):
        bucket.put_folder(tmp_path / name, name)
    images = read_image_set(bucket.url("") + "/" + location)
    assert contents(images) == contents(read_image_set(f"{tmp_path}/{location}"))
    assert images.id == read_image_set(images.address).id
    located = locate_images(Store(str(tmp_path / "root")), images, copy_to_store=True)
    assert images.folder is None and located == images.address


def test_a_set_is_offered_as_it_lies_or_as_a_copy(folder, tars, tmp_path):
    store = Store(str(tmp_path / "root"))
    for location in (str(folder), f"{tars}/set-*.tar"):
        images = read_image_set(location)
        assert locate_images(store, images, copy_to_store=False) == location
        key = locate_images(store, images, copy_to_store=True)
        copy = open_located_images(store, key, images.id)
        assert key == f"images/{images.id}" and contents(copy) == contents(images) and copy.id == images.id
    (tars / "set-001.tar").unlink()
    with pytest.raises(InputError, match="planned with 3-"):
        open_located_images(store, f"{tars}/set-*.tar", images.id)


@pytest.mark.parametrize(("location", "message"), [
    ("{}/nowhere", "is not a folder; expected images"),
    ("{}/empty", "holds no image"),
    ("{}/images/*.png", "is a pattern of image files: give their folder"),
    ("{}/both", r"holds \.tar and \.parquet files: give a pattern for one of them, such as .*/both/\*\.tar"),
    ("https://example.org/set.tar", "cannot be listed over http: download it"),
    ("s3://key:secret@bucket/images", "holds a password"),
    ("s3://secret@bucket/images", "holds a password"),
    ("nosuch://bucket/images", "is not a usable address"),
    ("file://data/images", "names the host data, not a folder"),
])
def test_unusable_addresses_are_one_line(folder, tmp_path, location, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    for name in ("a.tar", "a.parquet"):
        (tmp_path / "both" / name).touch()
    with pytest.raises(InputError, match=message) as error:
        read_image_set(location.format(tmp_path))
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_folder_whose_name_looks_like_a_pattern(folder):
    renamed = folder.rename(folder.with_name("images [2024]"))
    assert len(read_image_set(str(renamed))) == 4


def test_the_index_of_many_images_is_small(tmp_path):
    """A hundred thousand images of a data set cost tens of megabytes, their bytes are never held."""
    rows = 100_000
    texts = [f"a woman, number {row}" for row in range(rows)]
    pq.write_table(pa.table({"image": [b"x" * 100] * rows, "text": texts}), tmp_path / "a.parquet")
    images = read_image_set(str(tmp_path))
    assert len(images) == rows and len(images.shards) == 391 and images.index.nbytes < 10e6
    assert images.shard(390)["caption"][0].as_py() == texts[390 * image_sets.IMAGES_PER_SHARD]
