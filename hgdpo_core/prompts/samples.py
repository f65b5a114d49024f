"""Samples: a prompt and, for a personalised model, the person it is about."""

from typing import Any

PERSON = "{person}"
"""In a prompt: stands for what a concept calls its person."""


class Sample(str):
    """A prompt with a concept: its text wherever text is read, but another sample for each concept.

    Two samples are equal, and have one id and one seed, where text, concept and caption are. A plain str is a sample
    without a concept; ids and seeds of those stay what they were.
    """

    __slots__ = ("caption", "concept")

    concept: str
    """The concept's id."""
    caption: str | None
    """What scorers read instead of the text, which leaves to the concept's image how the person looks."""

    def __new__(cls, text: str, concept: str, caption: str | None = None) -> "Sample":
        sample = super().__new__(cls, text)
        sample.concept, sample.caption = concept, caption
        return sample

    @property
    def key(self) -> str:
        """What ids and seeds are made of."""
        parts = (str(self), self.concept, *(() if self.caption is None else (self.caption,)))
        return "\0".join(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return Sample, (str(self), self.concept, self.caption)


def sample_key(prompt: str) -> str:
    """What ids and seeds of a prompt are made of: its text, for a `Sample` with its concept."""
    return prompt.key if isinstance(prompt, Sample) else prompt


def concept_of(prompt: str) -> str | None:
    """The id of a sample's concept; None for a plain prompt."""
    return prompt.concept if isinstance(prompt, Sample) else None


def caption_of(prompt: str) -> str | None:
    """What scorers read of a sample, where that is not its text."""
    return prompt.caption if isinstance(prompt, Sample) else None


def as_sample(text: str, concept: str | None, caption: str | None = None) -> str:
    """The sample of a text and a concept's id; the text itself without a concept."""
    return text if concept is None else Sample(text, concept, caption)
