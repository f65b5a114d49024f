"""Captions by LLaVA: real generation by a tiny one; what is there stays, what stops goes on, errors are one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import save_llava

from flows import cli
from hgdpo_core.errors import InputError, ModelError, StoppedError
from hgdpo_core.image_sets import llava as captioner_module
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.image_sets.captions import find_uncaptioned, write_captions
from hgdpo_core.image_sets.llava import Captioner, find_captioner
from hgdpo_core.storage import Store

TEMPLATE = ("{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
            "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}ANSWER:")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def folder(tmp_path):
    """a.png has metadata, b.png a text, c.png an empty text, f.png is broken; d.jpg and sub/e.png have nothing."""
    location = tmp_path / "images"
    (location / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (32, 32), "b.png": (50, 40), "c.png": (20, 64), "d.jpg": (64, 33),
                       "sub/e.png": (32, 48)}.items():
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(location / name)
    (location / "f.png").write_bytes(b"no image")
    (location / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "one"}))
    (location / "b.txt").write_text("two")
    (location / "c.txt").write_text("\n")
    return location


def read_images(folder):
    return [Image.open(folder / name).convert("RGB") for name in ("c.png", "d.jpg", "sub/e.png")]


def text_of(folder, name):
    return (folder / name).read_text()


def answers(captioner, images, count):
    """Token by token without transformers' generate: the largest logit each time."""
    text = captioner._conversation("What?")
    inputs = captioner._processor(images=images, text=[text], return_tensors="pt")
    ids = inputs["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            logits = captioner._model(input_ids=ids, pixel_values=inputs["pixel_values"],
                                      attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 2:
            break
    answer = ids[0, inputs["input_ids"].shape[1]:]
    return " ".join(captioner._processor.decode(answer, skip_special_tokens=True).split())


def test_a_batch_gives_what_each_image_gives_alone(llava, folder):
    captioner = Captioner(llava, "What?", device="cpu", dtype="float32", max_new_tokens=6)
    together = captioner.describe(read_images(folder))
    assert together == [answers(captioner, [image], 6) for image in read_images(folder)]
    assert len(set(together)) > 1 and all("\n" not in caption for caption in together)
    longer = Captioner(llava, "What?", device="cpu", dtype="float32", max_new_tokens=12).describe(read_images(folder))
    assert longer != together
    assert Captioner(llava, "A different question", device="cpu", dtype="float32", max_new_tokens=6).describe(
        read_images(folder)) != together
    assert Captioner(llava, "What?", device="cpu", dtype="bfloat16", max_new_tokens=6)._model.dtype == torch.bfloat16


def test_a_models_own_template_is_used(tmp_path, llava):
    plain = Captioner(llava, " What? ", device="cpu", dtype="float32")
    assert plain._text == "USER: <image>\nWhat? ASSISTANT:"
    own = Captioner(save_llava(tmp_path / "own", chat_template=TEMPLATE), "What?", device="cpu", dtype="float32")
    assert own._text == "user: <image> What? ANSWER:"


def test_the_command_writes_what_is_missing_and_nothing_else(llava, folder, capsys, monkeypatch):
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    command = ["caption", "--images", str(folder), "--model", str(llava), "--dtype", "float32", "--batch-size", "2",
               "--max-new-tokens", "5", "--prompt", "What?"]
    assert cli.main([*command, "--plan"]) == 0
    assert capsys.readouterr().out == "Images: 6; to caption: 4\n" and not (folder / "d.txt").exists()
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "Captions written: 3; images that had one: 2" in out
    assert "Without a caption: f.png: 8 bytes do not decode as an image" in out
    expected = Captioner(llava, "What?", device="cpu", dtype="float32", max_new_tokens=5).describe(read_images(folder))
    assert [text_of(folder, name).strip() for name in ("c.txt", "d.txt", "sub/e.txt")] == expected
    assert text_of(folder, "b.txt") == "two" and not (folder / "a.txt").exists()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp")]
    assert read_image_set(str(folder)).index["caption"].to_pylist() == ["one", "two", *expected[:2], None, expected[2]]
    assert cli.main(command) == 1  # what is left cannot be captioned
    (folder / "f.png").unlink()
    assert cli.main(command) == 0 and "Images: 5; all of them have captions" in capsys.readouterr().out


def test_a_stop_keeps_what_is_written_and_the_next_start_goes_on(folder):
    described, stops = [], iter([False, True])

    def describe(images):
        described.append(len(images))
        return ["a caption"] * len(images)

    with pytest.raises(StoppedError, match="after 1 of 4 images"):
        write_captions(find_uncaptioned(str(folder)), describe, batch_size=1, should_stop=lambda: next(stops))
    seen = []
    result = write_captions(find_uncaptioned(str(folder)), describe, batch_size=2,
                            progress=lambda *at: seen.append(at))
    assert result.written == 2 and described == [1, 1, 1]  # a batch of d.jpg and the broken one, one of sub/e.png
    assert seen == [(2, 3, "images"), (3, 3, "images")]


def test_what_others_wrote_meanwhile_and_silence_are_no_captions_of_ours(folder):
    def describe(images):
        (folder / "d.txt").write_text("theirs")
        return ["ours", "ours", ""][:len(images)]

    (folder / "f.png").unlink()
    result = write_captions(find_uncaptioned(str(folder)), describe)
    assert result.written == 1 and result.problems == {"sub/e.png": "the model gave no caption"}
    assert text_of(folder, "d.txt") == "theirs" and text_of(folder, "c.txt") == "ours\n"


def test_images_of_a_bucket_get_captions_too(folder, tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    store.put_folder(folder, "images")
    images = find_uncaptioned(store.url("images"))
    assert write_captions(images, lambda batch: ["a caption"] * len(batch)).written == 3
    assert store.read_bytes("images/sub/e.txt") == b"a caption\n"


# -- what can be wrong


def test_unusable_models_are_one_line(llava, tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")

    def refuse(model, message):
        assert cli.main(["caption", "--images", str(folder), "--model", str(model)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error

    refuse(tmp_path / "nowhere", "does not exist: expected a folder or a hub id like llava-hf/")
    refuse("nobody/no-such-llava", "could not be downloaded from the hub:")
    for name, spoil, message in (("other", lambda location: edit(location, model_type="clip"), "is of the kind clip"),
                                 ("cut", cut_off, "does not load as LLaVA"),
                                 ("lacking", drop_weights, "(1 such tensors): these are weights of"),
                                 ("broken", break_weight, "holds NaN or infinity in LLaVA's"),
                                 ("bare", lambda copy: [p.unlink() for p in copy.glob("*token*")], "does not load")):
        copy = shutil.copytree(llava, tmp_path / name)
        spoil(copy)
        refuse(copy, message)


def edit(location, **changes):
    config = json.loads((location / "config.json").read_text())
    (location / "config.json").write_text(json.dumps(config | changes))


def cut_off(location):
    data = (location / "model.safetensors").read_bytes()
    (location / "model.safetensors").write_bytes(data[:len(data) // 2])


def break_weight(location):
    weights = load_file(location / "model.safetensors")
    weights[min(weights)].view(-1)[0] = float("nan")
    save_file(weights, location / "model.safetensors", {"format": "pt"})


def drop_weights(location):
    weights = load_file(location / "model.safetensors")
    weights.pop(min(weights))
    save_file(weights, location / "model.safetensors", {"format": "pt"})


def test_unusable_images_and_questions_are_one_line(llava, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image files, beside which captions are written: unpack"):
        find_uncaptioned(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="the question to the caption model is empty"):
        Captioner(llava, " ", device="cpu", dtype="float32")
    for option in ("--batch-size", "--max-new-tokens"):
        with pytest.raises(SystemExit):
            cli.main(["caption", "--images", str(folder), option, "0"])


def test_too_large_a_batch_is_one_line_with_what_to_lower(llava, folder, monkeypatch):
    captioner = Captioner(llava, "What?", device="cpu", dtype="float32")

    def generate(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captioner._model, "generate", generate)
    with pytest.raises(ModelError, match="does not hold 3 images at a time: lower --batch-size"):
        captioner.describe(read_images(folder))


def test_a_hub_id_is_downloaded(llava, monkeypatch):
    monkeypatch.setattr(captioner_module, "snapshot_download", lambda name, **_: str(llava))
    assert find_captioner("owner/llava") == llava
