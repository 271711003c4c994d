"""Lengths of training, in epochs or optimizer steps."""

import math
import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Duration:
    """A length of training: `7` or `7epochs`, `0.5` epochs, `200steps` (optimizer steps)."""

    value: float
    unit: Literal["epochs", "steps"] = "epochs"

    @classmethod
    def parse(cls, text: str | float) -> "Duration":
        """Read a duration. Raises ValueError on anything else, on a negative and on part of a step."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(epochs?|ep|steps?|)\s*", str(text))
        if not match:
            raise ValueError(f"'{text}' is not a duration such as 7, 0.5epochs or 200steps")
        unit: Literal["epochs", "steps"] = "steps" if match[2].startswith("step") else "epochs"
        value = float(match[1])
        if not math.isfinite(value) or (unit == "steps" and value != int(value)):
            raise ValueError(f"'{text}' is not a duration such as 7, 0.5epochs or 200steps")
        return cls(value, unit)

    def steps(self, steps_per_epoch: int) -> int:
        """The same length in optimizer steps, rounded to the nearest."""
        return round(self.value * (steps_per_epoch if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        number = int(self.value) if self.value == int(self.value) else self.value
        return f"{number}{'steps' if self.unit == 'steps' else ''}"
