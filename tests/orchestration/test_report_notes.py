"""What the page says about its judges."""

from hgdpo_core.config import ScorerConfig
from hgdpo_core.scorers.towers import OPENAI_CLIP
from tasks.report import _notes


def test_the_page_says_which_clip_and_which_judge():
    assert _notes((ScorerConfig(name="clip"),)) == [f"CLIP is the checkpoint {OPENAI_CLIP}."]
    clip, figures = _notes((ScorerConfig(name="clip", source="my/clip"), ScorerConfig(source="figures")))
    assert "my/clip" in clip and "trained on drawings" in figures
    assert _notes((ScorerConfig(),)) == []
