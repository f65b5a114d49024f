"""The moving average of weights in training (EMA), by diffusers' EMAModel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from diffusers.training_utils import EMAModel


class WeightAverage:
    """The average of all weights of a network; it takes as much memory again as they do.

    At step s it keeps min(decay, s / (9 + s)) of itself, and at the first step nothing, so that the start of a short
    training does not dominate.
    """

    def __init__(self, network: ModelMixin, decay: float):
        self._network = network
        self._average = EMAModel(network.parameters(), decay=decay)

    def step(self) -> None:
        """Take in the weights as they are after a step."""
        self._follow()
        self._average.step(self._network.parameters())

    def put_in_place(self) -> None:
        """Give the network the averaged weights."""
        self._average.copy_to(self._network.parameters())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averaged weights; after it, its own, bit by bit."""
        self._average.store(self._network.parameters())
        self.put_in_place()
        try:
            yield
        finally:
            self._average.restore(self._network.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier `state_dict`."""
        self._average.load_state_dict(dict(state))
        self._follow()

    def _follow(self) -> None:
        """Move to the device of the weights: training moves them after this was made."""
        if self._average.shadow_params[0].device != self._network.device:
            self._average.to(self._network.device)
