"""Representations of scans and what is known about each, as one table.

Shapes: N scans, F features.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.checkpoint import write_atomically

SEXES = ("F", "M", "")
DIAGNOSES = ("control", "patient", "")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """The representation h of N scans beside their metadata; no identifier, no path.

    Attributes:
        h_NF: (N, F) float32, finite.
        subject: (N,) int, a site-local index of at least 0; with `site` it names a subject.
        site: (N,) text, not empty.
        scanner: (N,) text; two sites may use the same name for different scanners.
        sex: (N,) "F", "M" or "" for unknown.
        diagnosis: (N,) "control", "patient" or "" for unknown.
        split: (N,) "train", "val" or "test"; all scans of a subject are in one split.
        age_years: (N,) float64, nan for unknown.

    Raises:
        ValueError: Wrong length, dtype or value, or a subject in two splits.
    """

    h_NF: npt.NDArray[np.float32]
    subject: npt.NDArray[np.int64]
    site: npt.NDArray[np.str_]
    scanner: npt.NDArray[np.str_]
    sex: npt.NDArray[np.str_]
    diagnosis: npt.NDArray[np.str_]
    split: npt.NDArray[np.str_]
    age_years: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.h_NF.ndim != 2 or self.h_NF.dtype != np.float32:
            raise ValueError(f"Embeddings: h_NF must be a float32 matrix, got {(self.h_NF.dtype.name, self.h_NF.shape)!r}.")
        num_scans = len(self.h_NF)
        kinds = {"subject": "iu", "age_years": "f"}
        for name in _METADATA:
            column = getattr(self, name)
            if column.shape != (num_scans,) or column.dtype.kind not in kinds.get(name, "U"):
                raise ValueError(
                    f"Embeddings: {name} must be one {'number' if name in kinds else 'text'} for each of the "
                    f"{num_scans} scans, got {(column.dtype.name, column.shape)!r}."
                )
        if not np.isfinite(self.h_NF).all():
            bad = int((~np.isfinite(self.h_NF)).any(axis=1).sum())
            raise ValueError(f"Embeddings: h_NF must be finite, got {bad!r} scans that are not.")
        if np.isinf(self.age_years).any() or (self.age_years < 0).any():
            raise ValueError(
                f"Embeddings: age_years must be at least 0 or nan, got {np.nanmin(self.age_years)!r} to "
                f"{np.nanmax(self.age_years)!r}."
            )
        if num_scans and self.subject.min() < 0:
            raise ValueError(f"Embeddings: subject must be an index of at least 0, got {int(self.subject.min())!r}.")
        if (self.site == "").any():
            raise ValueError(f"Embeddings: site must be a non-empty text, got {''!r}.")
        for name, known in (("sex", SEXES), ("diagnosis", DIAGNOSES), ("split", SPLITS)):
            unknown = sorted(set(np.unique(getattr(self, name)).tolist()) - set(known))
            if unknown:
                raise ValueError(f"Embeddings: {name} must be one of {known}, got {unknown[0]!r}.")
        split_of_subject = np.unique(np.stack([self.subjects, np.unique(self.split, return_inverse=True)[1]]), axis=1)
        shared = split_of_subject.shape[1] - len(np.unique(self.subjects))
        if shared:
            raise ValueError(f"Embeddings: a subject must be in one split, got {shared!r} in more than one; split by subject.")

    def __len__(self) -> int:
        return len(self.h_NF)

    @property
    def subjects(self) -> npt.NDArray[np.int64]:
        """(N,) int that is unique to a subject across sites."""
        site_N = np.unique(self.site, return_inverse=True)[1].astype(np.int64)
        return np.unique(np.stack([site_N, self.subject.astype(np.int64)]), axis=1, return_inverse=True)[1].reshape(-1)

    def select(self, mask: npt.NDArray[Any]) -> "Embeddings":
        """The scans of an (N,) boolean mask, or of an array of indices."""
        return Embeddings(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence["Embeddings"]) -> Self:
        """One table from several, in their order, say one a site.

        Raises:
            ValueError: No part, or parts that differ in the number of features.
        """
        widths = sorted({part.h_NF.shape[1] for part in parts})
        if len(widths) != 1:
            raise ValueError(f"Embeddings.concatenate: parts must have one number of features, got {widths!r}.")
        return cls(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def save(self, path: Path) -> None:
        """Write as .npz, whole or not at all."""
        content = io.BytesIO()
        np.savez(content, **{field.name: getattr(self, field.name) for field in fields(self)})
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ValueError: Other arrays than those of `Embeddings`, or values out of range.
        """
        with np.load(path, allow_pickle=False) as archive:
            names = sorted(field.name for field in fields(cls))
            if sorted(archive.files) != names:
                raise ValueError(f"Embeddings.load: {path.name} must hold the arrays {names}, got {sorted(archive.files)!r}.")
            return cls(**{name: archive[name] for name in names})


_METADATA = tuple(field.name for field in fields(Embeddings) if field.name != "h_NF")
