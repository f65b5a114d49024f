"""Samples: a prompt and, for a personalised model, the person it is about."""

from typing import Any


class Sample(str):
    """A prompt with a concept: its text wherever text is read, but another sample for each concept.

    `concept` is the concept's id. Two samples are equal, and have one id and one seed, where text and concept are. A
    plain str is a sample without a concept; ids and seeds of those stay what they were.
    """

    __slots__ = ("concept",)

    concept: str

    def __new__(cls, text: str, concept: str) -> "Sample":
        sample = super().__new__(cls, text)
        sample.concept = concept
        return sample

    @property
    def key(self) -> str:
        """What ids and seeds are made of; no prompt holds the zero byte and 16 hex digits by accident."""
        return f"{str(self)}\0{self.concept}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return Sample, (str(self), self.concept)


def sample_key(prompt: str) -> str:
    """What ids and seeds of a prompt are made of: its text, for a `Sample` with its concept."""
    return prompt.key if isinstance(prompt, Sample) else prompt


def concept_of(prompt: str) -> str | None:
    """The id of a sample's concept; None for a plain prompt."""
    return prompt.concept if isinstance(prompt, Sample) else None


def as_sample(text: str, concept: str | None) -> str:
    """The sample of a text and a concept's id; the text itself without a concept."""
    return text if concept is None else Sample(text, concept)
