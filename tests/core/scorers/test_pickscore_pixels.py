"""PickScore of pixels, with a gradient: how near to PIL's way it is, and that the gradient is true."""

import numpy as np
import pytest
import torch
from PIL import Image

from hgdpo_core.scorers import load_scorer
from hgdpo_core.scorers.pixels import crop_pixels, crop_tensor, floor_half


@pytest.mark.parametrize(("width", "height", "size"), [
    (64, 64, 32), (70, 102, 22), (101, 71, 33), (40, 40, 64), (512, 512, 224), (704, 1024, 224)])
def test_tensors_are_cropped_nearly_as_pil_does(width, height, size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    pil = crop_pixels([image], size, halve=floor_half).float()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    ours = 255 * crop_tensor(pixels, size, halve=floor_half)
    assert ours.shape == pil.shape
    assert (ours - pil).abs().max() <= 2 and (ours - pil).abs().mean() <= 0.35


def test_its_scores_are_near_the_stored_ones_and_its_gradient_is_true():
    scorer = load_scorer("pickscore", source="figures")
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(3)]
    prompts = ["a woman in a red top", "a man in a blue top", "a boy in a green top"]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])
    pixels.requires_grad_(True)
    scores = scorer.score_pixels(pixels, prompts)
    assert (scores.detach() - scorer.score(images, prompts)).abs().max() < 0.1
    scores.sum().backward()
    gradient, step = pixels.grad, 1e-2
    direction = gradient / gradient.norm()
    with torch.no_grad():
        moved = [scorer.score_pixels((pixels + by * direction).detach(), prompts).sum() for by in (step, -step)]
    assert ((moved[0] - moved[1]) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=2e-2)
    assert all(p.grad is None for p in scorer.model.parameters())
