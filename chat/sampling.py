"""The sampling parameters: each is declared here alone, with its range; the page, the API and the engines read them."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, cast

from chat.persona import Refused

MAX_NEW_TOKENS = 512
MIN_TEMPERATURE = 0.01  # the lowest that is not greedy: logits are divided by it


def _parameter(default: float, low: float, high: float, step: float) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "step": step})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the defaults are those of Qwen2.5's generation_config.json. Temperature 0 is greedy.

    Raises Refused for a value out of range: the page's API takes what strangers send.
    """

    temperature: float = _parameter(0.7, 0, 2, 0.05)
    top_p: float = _parameter(0.8, 0.05, 1, 0.05)
    top_k: int = _parameter(20, 1, 200, 1)
    repetition_penalty: float = _parameter(1.05, 1, 2, 0.01)
    max_new_tokens: int = _parameter(256, 1, MAX_NEW_TOKENS, 1)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, parameter in PARAMETERS.items():
            value, low, high = getattr(self, name), parameter.metadata["low"], parameter.metadata["high"]
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise Refused(f"{name} is {reprlib.repr(value)}; choose a number from {low} to {high}.")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise Refused(f"temperature is {self.temperature!r}; choose 0, or a number from {MIN_TEMPERATURE} to 2.")

    @classmethod
    def parse(cls, values: Mapping[str, Any], seed: int | None = None) -> "Sampling":
        """From numbers as a slider or a JSON document gives them: whole parameters may come as floats."""
        whole = {
            name: int(value)
            for name, value in values.items()
            if PARAMETERS[name].type is int and isinstance(value, float) and math.isfinite(value)
        }
        return cls(**{**values, **whole}, seed=seed)

    def parameters(self) -> dict[str, Any]:
        """Each parameter by its name, of the type declared: a slider at 1 sends an int for a float."""
        return {name: cast("Any", each.type)(getattr(self, name)) for name, each in PARAMETERS.items()}


PARAMETERS: dict[str, "Field[Any]"] = {each.name: each for each in fields(Sampling) if each.metadata}
