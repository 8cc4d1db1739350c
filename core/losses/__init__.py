"""Objectives and debiasing, one family a file: contrastive (NTXent), weak (YAware), fairkl (FairKL), kernels."""

from core.losses.contrastive import NTXent
from core.losses.fairkl import FairKL
from core.losses.weak import YAware

Objective = NTXent | YAware
OBJECTIVES: dict[str, type[NTXent] | type[YAware]] = {"ntxent": NTXent, "yaware": YAware}

__all__ = ["OBJECTIVES", "FairKL", "NTXent", "Objective", "YAware"]
