"""The stages of fine-tuning: where each starts and what it trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

StageName = Literal["linear_probe", "last_block", "full_finetuning", "frozen_then_unfrozen", "from_scratch"]


@dataclass(frozen=True)
class Stage:
    """One way to fine-tune.

    Attributes:
        start: the pretrained encoder or random weights.
        trains: beside the head nothing, the encoder's last part, or all of it.
        thaws: the head alone is trained in the first ``finetune.frozen_rounds`` rounds.
    """

    start: Literal["pretrained", "random"] = "pretrained"
    trains: Literal["head", "last_block", "all"] = "all"
    thaws: bool = False


STAGES: Mapping[StageName, Stage] = {
    "linear_probe": Stage(trains="head"),
    "last_block": Stage(trains="last_block"),
    "full_finetuning": Stage(),
    "frozen_then_unfrozen": Stage(thaws=True),
    "from_scratch": Stage(start="random"),
}
