"""Hardening of what leaves a site. No differential privacy is claimed here: one site is not a crowd to hide in."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]


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


PrivacyChoice = NoHardening | ClipAndNoise


def harden(local: Mapping[str, Tensor], received: Mapping[str, Tensor], choice: PrivacyChoice) -> State:
    """The state that may leave the site: ``received`` plus the clipped and noised update; equal to ``local`` without either.

    The noise comes from the operating system's entropy, never from the run's seed, which the server knows.
    """
    if isinstance(choice, NoHardening):
        return dict(local)
    floating = [name for name, value in local.items() if value.is_floating_point()]
    norm = torch.cat([(local[name].double() - received[name].double()).flatten() for name in floating]).norm()
    if norm <= choice.clip_norm and choice.noise_multiplier == 0:
        return dict(local)
    scale = min(1.0, choice.clip_norm / max(float(norm), 1e-30))
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    hardened = dict(local)
    for name in floating:
        update = (local[name].double() - received[name].double()) * scale
        if choice.noise_multiplier:
            noise = torch.randn(update.shape, generator=generator, dtype=torch.float64)
            update += choice.noise_multiplier * choice.clip_norm * noise
        hardened[name] = (received[name].double() + update).to(local[name].dtype)
    return hardened
