"""Objectives and debiasing, one family a file, usable on any two batches of embeddings.

kernels          how alike two scans' labels are
embedded         the views of a step, their similarities, and sums over pairs
contrastive      NTXent, InfoNCE, SupCon, EpsSupInfoNCE
weak             YAware, Exp, Threshold: weighted by the likeness of labels
uniformity       AlignmentUniformity, DecoupledUniformity
barlow_twins     BarlowTwins
semi_supervised  DecoupledConditional, Joint
fairkl           FairKL, ReleasedFairKL, EnD

>>> import torch
>>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
>>> loss = YAware(kernel=Kernel(bandwidths={"age_years": 5.0}))(z1, z2, {"age_years": torch.linspace(20, 80, 8)})
>>> loss.shape
torch.Size([])
"""

from core.losses.barlow_twins import BarlowTwins
from core.losses.contrastive import EpsSupInfoNCE, InfoNCE, NTXent, SupCon
from core.losses.embedded import EmbeddedViews, Objective
from core.losses.fairkl import EnD, FairKL, ReleasedFairKL
from core.losses.kernels import Kernel
from core.losses.semi_supervised import DecoupledConditional, Joint
from core.losses.uniformity import AlignmentUniformity, DecoupledUniformity
from core.losses.weak import Exp, Threshold, YAware

OBJECTIVES: dict[str, type[Objective]] = {
    "ntxent": NTXent,
    "infonce": InfoNCE,
    "supcon": SupCon,
    "eps_supinfonce": EpsSupInfoNCE,
    "yaware": YAware,
    "exp": Exp,
    "threshold": Threshold,
    "alignment_uniformity": AlignmentUniformity,
    "decoupled_uniformity": DecoupledUniformity,
    "barlow_twins": BarlowTwins,
    "decoupled_conditional": DecoupledConditional,
    "joint": Joint,
}

__all__ = [
    "OBJECTIVES",
    "AlignmentUniformity",
    "BarlowTwins",
    "DecoupledConditional",
    "DecoupledUniformity",
    "EmbeddedViews",
    "EnD",
    "EpsSupInfoNCE",
    "Exp",
    "FairKL",
    "InfoNCE",
    "Joint",
    "Kernel",
    "NTXent",
    "Objective",
    "ReleasedFairKL",
    "SupCon",
    "Threshold",
    "YAware",
]
