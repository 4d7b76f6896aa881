"""How fast a device that is not here will run a model: from its preset's published rates and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipcat_edge.plan_memory import kv_bytes_per_token

if TYPE_CHECKING:
    from skipcat_edge.device import Device, Rates
    from skipcat_edge.synth_plan import Plan as PlannedModel

# Of what fewer bytes and multiplications allow: docs/speed.md, geometric means of llama-3.2-1b over all
# types, prompts and contexts. Smaller models gain less.
LOW_RANK_DECODE, LOW_RANK_PROMPT = 0.97, 0.93
# A Pi 5 decodes with 10.25 of the 11.59 GB/s that are measured there, and of 17.07 by its memory's clock
# (devices/rpi5.toml).
_OF_MEASURED, _OF_THEORETICAL = 0.88, 0.6


@dataclass(frozen=True)
class PresetSpeed:
    """Predictions for one device; None where nothing is known."""

    device: Device

    def prompt_s(self, model: PlannedModel, tokens: int) -> float | None:
        """Seconds of a prompt of `tokens` tokens whose last one gets logits."""
        rates = self._rates(model)
        if rates is None:
            return None
        dimensions = model.model
        head = dimensions.n_vocab * dimensions.n_embd
        attention = dimensions.n_layer * dimensions.n_head * dimensions.head_dim * tokens * (tokens + 1)
        seconds = (tokens * model.linear_parameters + attention + head) / rates.prompt
        return seconds / (LOW_RANK_PROMPT if model.low_rank else 1)

    def decode_s(self, model: PlannedModel, depth: float) -> float | None:
        """Seconds of a token after `depth` others: weights, keys and values are read once."""
        bandwidth = self._decode_bandwidth(model)
        if bandwidth is None:
            return None
        weights = model.bytes_per_token / (LOW_RANK_DECODE if model.low_rank else 1)
        return (weights + kv_bytes_per_token(model.model) * depth) / bandwidth

    def basis(self) -> str:
        """A sentence that says what the predictions come from."""
        memory, rates = self.device.memory, self.device.rates
        if rates:
            types = " and ".join(each.type for each in rates)
            return (f"Speeds: from rates that were measured on such a device with {types} "
                    f"(`skipcat-edge devices {self.device.name}` names the sources); other types are taken "
                    "for equally fast per byte and multiplication.")
        if memory.measured_bandwidth or memory.theoretical_bandwidth:
            share, what = ((_OF_MEASURED, "measured") if memory.measured_bandwidth
                           else (_OF_THEORETICAL, "theoretical"))
            return (f"Decode speeds: {share:.0%} of the {what} bandwidth of the memory, as on a Raspberry "
                    "Pi 5. How fast prompts are there is not known; measure one with `skipcat-edge bench`.")
        return "Nothing is known of this device's speed; `skipcat-edge bench` measures it there."

    def _rates(self, model: PlannedModel) -> Rates | None:
        rates = {each.type: each for each in self.device.rates}
        return rates.get(model.type.name) or next(iter(rates.values()), None)

    def _decode_bandwidth(self, model: PlannedModel) -> float | None:
        memory, rates = self.device.memory, self._rates(model)
        if rates is not None:
            return rates.decode
        if memory.measured_bandwidth:
            return _OF_MEASURED * memory.measured_bandwidth
        return _OF_THEORETICAL * memory.theoretical_bandwidth if memory.theoretical_bandwidth else None
