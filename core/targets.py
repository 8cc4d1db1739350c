"""What fine-tuning learns to tell of a scan: a class, several findings, a number; labels, loss and scores of each.

Shape legend: N scans, L labels, K outputs of the head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from core.data.labels import MISSING, Code, code
from core.data.manifest import Scan

Kind = Literal["binary", "multiclass", "multilabel", "regression"]
KNOWN_CLASSES = {"diagnosis": ("control", "patient"), "sex": ("F", "M")}
NO_YES = ("0", "1")


class TargetError(ValueError):
    """Labels that cannot be learnt from; the text holds counts and names of columns only and may leave the site."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the head tells.

    Attributes:
        kind: ``binary``, one of two classes; ``multiclass``, one of several; ``multilabel``, findings that do not exclude each
            other; ``regression``, a number.
        labels: what a scan is known by: ``diagnosis``, ``sex``, ``age_years``, or columns that ``data.columns.targets`` names;
            several with multilabel, else one. A column called diagnosis or sex is read as it stands when the classes are others.
        classes: how the columns write the classes, in the order of the outputs; 1 and 1.0 are one class, and so are AD and ad. Of
            two the second is the positive one. None: control and patient, F and M, else 0 and 1.
        offset: a number is learnt as its difference from this, in its unit,
        scale: in units of this; 50 and 20 suit ages.
    """

    kind: Kind = "binary"
    labels: tuple[str, ...] = ("diagnosis",)
    classes: tuple[Code, ...] | None = None
    offset: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels) or not self.labels or (self.kind != "multilabel" and len(self.labels) > 1):
            raise ValueError(f"labels must be {'different' if self.kind == 'multilabel' else 'one'}, got {list(self.labels)}")
        if self.kind == "regression" and self.classes is not None:
            raise ValueError(f"classes must be null with regression, got {list(self.classes)}")
        wanted = {"binary": 2, "multilabel": 2}.get(self.kind)
        codes = set(map(code, self.names))
        if self.kind != "regression" and (
            len(codes) != len(self.names) or len(codes) < 2 or wanted not in (None, len(self.names))
        ):
            raise ValueError(f"classes must be {wanted or 'two or more'} different ones with {self.kind}, got {list(self.names)}")
        if codes & MISSING:
            raise ValueError(
                f"classes must be told from missing values, got {list(self.names)}; write {min(codes & MISSING)!r} otherwise"
            )
        if self.kind != "regression" and "age_years" in self.labels:
            raise ValueError("labels must be classes, got age_years: it goes with kind=regression")
        if not (math.isfinite(self.offset) and 0 < self.scale < math.inf):
            raise ValueError(f"offset must be finite and scale positive, got {self.offset} and {self.scale}")

    @property
    def names(self) -> tuple[str, ...]:
        """The classes by name; () with regression."""
        if self.kind == "regression":
            return ()
        usual = KNOWN_CLASSES.get(self.labels[0], NO_YES) if len(self.labels) == 1 else NO_YES
        return usual if self.classes is None else self.classes

    @property
    def num_outputs(self) -> int:
        """K: one for each class or finding; one with binary, for the second class, and with regression."""
        return {"binary": 1, "regression": 1, "multilabel": len(self.labels)}.get(self.kind, len(self.names))

    @property
    def task(self) -> str:
        """What an `Evaluation` calls it: the one label, or ``findings``."""
        return "age" if self.labels == ("age_years",) else self.labels[0] if len(self.labels) == 1 else "findings"

    def values(self, scans: Sequence[Scan]) -> Tensor:
        """(N, L) float64: the number of the class, 0 or 1 of each finding, or the number itself; NaN where it is unknown.

        Raises:
            TargetError: a column that no scan has, or a cell that is neither a class nor missing.
        """
        numbers = {code(name): float(number) for number, name in enumerate(self.names)}
        read = self._number if self.kind == "regression" else partial(self._class, numbers)
        rows = [[read(label, scan) for label in self.labels] for scan in scans]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(scans), len(self.labels))

    def _cell(self, label: str, scan: Scan) -> str | None:
        cells = dict(scan.targets)
        usual = KNOWN_CLASSES.get(label)
        if usual is not None and (label not in cells or set(self.names) == set(usual)):
            return getattr(scan, label)  # type: ignore[no-any-return]
        if label not in cells:
            raise TargetError(
                f"target {label!r}: it must be diagnosis, sex, age_years or one of data.columns.targets, the table has "
                f"{sorted(cells) or 'none of these'}. Name the column in data.columns.targets."
            )
        return cells[label] or None

    def _class(self, numbers: Mapping[str, float], label: str, scan: Scan) -> float:
        cell = self._cell(label, scan)
        if cell is None:
            return math.nan
        number = numbers.get(code(cell))
        if number is None:
            raise TargetError(
                f"target {label!r}: each cell must be one of {list(self.names)} or missing, got another. Name all classes in "
                "finetune.target.classes, or the codes of missing values in data.columns.missing."
            )
        return number

    def _number(self, label: str, scan: Scan) -> float:
        if label == "age_years":
            return math.nan if scan.age_years is None else scan.age_years
        cell = self._cell(label, scan)
        try:
            value = math.nan if cell is None else float(cell)
        except ValueError:
            value = math.inf
        if abs(value) > torch.finfo(torch.float32).max:
            raise TargetError(f"target {label!r}: each cell must be a finite number or missing, got another. Mend the table.")
        return value

    def loss(self, logits_NK: Tensor, values_NL: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss of each scan, (N,): cross-entropy, mean binary cross-entropy of the known findings, or squared error.

        Args:
            logits_NK: what the head gives.
            values_NL: as `values` gives them; a scan whose label is unknown has loss 0.
            weights: of the classes, (2,) or (K,), or of absent and present findings, (L, 2); None: all alike.
        """
        known_NL = ~values_NL.isnan()
        if self.kind == "multiclass":
            codes_N = values_NL[:, 0].nan_to_num(nan=0.0).long()
            weight = None if weights is None else weights.to(logits_NK.dtype)
            return torch.nn.functional.cross_entropy(logits_NK, codes_N, weight, reduction="none") * known_NL[:, 0]
        wanted_NL = values_NL.nan_to_num(nan=0.0).to(logits_NK.dtype)
        if self.kind == "regression":
            error_N = logits_NK[:, 0] - (wanted_NL[:, 0] - self.offset) / self.scale
            return error_N.square() * known_NL[:, 0]
        each_NL = torch.nn.functional.binary_cross_entropy_with_logits(logits_NK, wanted_NL, reduction="none")
        if weights is not None:
            weight_L2 = weights.to(logits_NK.dtype).reshape(-1, 2)
            each_NL = each_NL * torch.where(wanted_NL > 0.5, weight_L2[:, 1], weight_L2[:, 0])
        loss_N: Tensor = (each_NL * known_NL).sum(dim=1) / known_NL.sum(dim=1).clamp_min(1)
        return loss_N

    def scores(self, logits_NK: Tensor) -> Tensor:
        """Probabilities (N, K), of the second class with binary; or the number in its unit, (N, 1)."""
        if self.kind == "multiclass":
            return logits_NK.softmax(dim=1)
        return logits_NK * self.scale + self.offset if self.kind == "regression" else logits_NK.sigmoid()

    def balanced_weights(self, values_NL: Tensor) -> Tensor | None:
        """Class weights in inverse proportion to their number of scans, mean 1 over the known ones; None with regression."""
        if self.kind == "regression":
            return None
        count_LC = torch.stack([(values_NL == number).sum(dim=0) for number in range(len(self.names))], dim=1).double()
        shown_L1 = (count_LC > 0).sum(dim=1, keepdim=True)
        weight_LC = count_LC.sum(dim=1, keepdim=True) / (shown_L1 * count_LC).clamp_min(1)
        return (weight_LC if self.kind == "multilabel" else weight_LC[0]).float()

    def missing_classes(self, values_NL: Tensor) -> list[str]:
        """The classes, or findings and their absence, that no scan shows; empty with regression."""
        if self.kind == "regression":
            return [] if (~values_NL.isnan()).any() else ["any number"]
        missing = []
        for column, label in enumerate(self.labels):
            for number, name in enumerate(self.names):
                if not (values_NL[:, column] == number).any():
                    missing.append(f"{label}={name}" if len(self.labels) > 1 else name)
        return missing
