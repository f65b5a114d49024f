"""LLaVA, with which the paper described its images (arXiv:2405.20216v1, D.1): found, loaded, asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hgdpo_core.devices import DTYPES
from hgdpo_core.errors import InputError, ModelError, first_line
from hgdpo_core.models.files import read_config
from hgdpo_core.models.hub import find_or_download, quiet_transformers
from hgdpo_core.models.networks import check_finite, refuse_report
from hgdpo_core.models.tokenizers import check_tokenizer

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
DEFAULT_QUESTION = "Describe this image in one sentence: the people, their pose, what they wear, the place, the light."
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_captioner(source: str) -> Path:
    """The folder of a LLaVA model, downloaded if `source` is a hub id; ModelError, in one line, if not available."""
    path = find_or_download("caption model", source, lambda: snapshot_download(source, allow_patterns=FILES),
                            f"a folder or a hub id like {DEFAULT_MODEL}",
                            "; put its files into a folder and give that as --model")
    kind = read_config(path / "config.json").get("model_type")
    if kind != "llava":
        raise ModelError(f"caption model {source} is of the kind {kind}: expected a LLaVA in transformers' form, like "
                         f"{DEFAULT_MODEL}")
    return path


class Captioner:
    """A loaded LLaVA. The same image and question give the same caption: nothing is sampled."""

    def __init__(self, folder: Path, question: str = DEFAULT_QUESTION, *, device: str, dtype: str,
                 max_new_tokens: int = 75):
        """ModelError where the folder does not hold a whole model; InputError for an empty question."""
        if not question.strip():
            raise InputError("the question to the caption model is empty: ask what it should describe")
        self._device, self._max_new_tokens = device, max_new_tokens
        try:
            with quiet_transformers():
                self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
                loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                    folder, local_files_only=True, dtype=DTYPES[dtype], output_loading_info=True)
            model, report = loaded
        except Exception as error:  # a processor and three networks, each of which fails in its own ways
            raise ModelError(f"{folder} does not load as LLaVA: {first_line(error)}") from None
        refuse_report(str(folder), report)
        check_finite(folder, {"LLaVA": model}, "get it again")
        tokenizer = self._processor.tokenizer
        check_tokenizer(folder, lambda text: tokenizer(text).input_ids, model.get_input_embeddings().num_embeddings)
        self._model = model.to(device).eval()
        self._processor.tokenizer.padding_side = "left"  # answers begin where every question ends
        self._text = self._conversation(question.strip())

    def _conversation(self, question: str) -> str:
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self._processor.apply_chat_template([{"role": "user", "content": content}],
                                                       add_generation_prompt=True)
        return f"USER: {self._processor.image_token}\n{question} ASSISTANT:"  # LLaVA 1.5's, from before templates

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption of each RGB image, on one line; "" where the model has no answer."""
        inputs = self._processor(images=list(images), text=[self._text] * len(images), return_tensors="pt",
                                 padding=True).to(self._device, self._model.dtype)
        try:
            answers = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        except torch.OutOfMemoryError:
            raise ModelError(f"the memory of {self._device} does not hold {len(images)} images at a time: lower "
                             "--batch-size") from None
        texts = self._processor.batch_decode(answers[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
