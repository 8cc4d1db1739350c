"""Settings that a run and a site's policy share: how they are written, and what may leave a site.

Nothing here needs torch, whose import takes seconds: the commands of a site's IT read policies with it alone.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

LARGEST_EPSILON = 100.0
"""Above it a guarantee says nothing, and the exact accountant needs gigabytes."""


@dataclass(frozen=True, kw_only=True)
class MomentPolicy:
    """What a site lets out about a group; fewer subjects than this tell who is in it (membership inference).

    Attributes:
        min_group: smallest group whose mean may be sent.
        diagonal_subjects: fewest subjects of a site whose sum of squares of each feature may be sent.
        covariance_subjects_per_feature: a full covariance needs this many subjects for each feature.
        round_counts_to: counts are sent rounded to a multiple of this, at least one multiple.
    """

    min_group: int = 10
    diagonal_subjects: int = 60
    covariance_subjects_per_feature: int = 12
    round_counts_to: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "covariance_subjects_per_feature" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"site policy: {field.name} must be at least {least}, got {getattr(self, field.name)!r}.")

    def rounded(self, count: int) -> int:
        """A count as it may be sent."""
        return self.round_counts_to * max(1, round(count / self.round_counts_to))


@dataclass(frozen=True, kw_only=True)
class NoHardening:
    """``privacy=none``: the site's weights leave as they are."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class ClipAndNoise:
    """``privacy=clip_and_noise``: the site's update is clipped to a norm and Gaussian noise is added.

    Attributes:
        clip_norm: largest L2 norm of the update over all weights; infinite leaves it as it is.
        noise_multiplier: standard deviation of the noise, in units of ``clip_norm``.
    """

    name: Literal["clip_and_noise"] = "clip_and_noise"
    clip_norm: float = 10.0
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        if not self.clip_norm > 0:
            raise ValueError(f"privacy: clip_norm must be positive, got {self.clip_norm!r}.")
        if not 0 <= self.noise_multiplier < float("inf"):
            raise ValueError(f"privacy: noise_multiplier must be finite and at least 0, got {self.noise_multiplier!r}.")
        if self.noise_multiplier > 0 and self.clip_norm == float("inf"):
            raise ValueError("privacy: clip_norm must be finite when noise is added, got inf: noise scales with it.")


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """``privacy=dp_sgd``: each step of fine-tuning clips what a subject adds to it, and adds noise (Abadi et al. 2016).

    Attributes:
        target_epsilon: what all steps of fine-tuning at a site may spend; infinite clips without noise and guarantees nothing.
        delta: probability with which more may be lost; less than 1 / number of subjects.
        clip_norm: largest L2 norm of one subject's gradient over all trained weights.
        adjacency: ``zero_out``: the guarantee compares a subject whose scans are there with the same subject whose scans are
            missing and add nothing (Kairouz et al. 2021). A subject exchanged for another moves a step by up to twice as much.
    """

    name: Literal["dp_sgd"] = "dp_sgd"
    target_epsilon: float = 8.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    adjacency: Literal["zero_out"] = "zero_out"

    def __post_init__(self) -> None:
        if not (0.02 <= self.target_epsilon <= LARGEST_EPSILON or self.target_epsilon == math.inf):
            raise ValueError(
                f"privacy: target_epsilon must be from 0.02 to {LARGEST_EPSILON:g}, got {self.target_epsilon!r}. More guarantees "
                "nothing: inf clips without noise."
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"privacy: delta must be between 0 and 1, got {self.delta!r}. 1e-5 suits up to 10000 subjects.")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"privacy: clip_norm must be positive and finite, got {self.clip_norm!r}: noise scales with it.")


PrivacyChoice = NoHardening | ClipAndNoise | DpSgd
