"""A site effect in images: counterfactual, since the same anatomies are scanned on every scanner.

The encoder's table of anatomy by scanner holds the effect that the consortium, where each subject meets one scanner, can only
estimate.

Shape legend: N subjects, F features, S scanners, A anatomies, K directions, Q given columns.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.checkpoint import load_strictly
from core.config import ImageData
from core.data.bids import list_sites
from core.data.volumes import VolumeSettings, load_volume
from core.erasure import Eraser
from core.evaluation.embeddings import Embeddings
from core.models import Pretrainer, build_pretrainer
from core.settings import MomentPolicy
from simulations.age_maps import healthy_embeddings
from simulations.cohort import CONSORTIUM, PRETRAINING_SITES, Scanner, acquire, draw_anatomy
from simulations.planted_measures import (
    Figure3,
    Floats,
    age_fit,
    beyond,
    fitted_eraser,
    given_columns,
    last_state,
    planted_share,
    projector_gap,
    recovered_share,
    run_apps,
)

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Counterfactual:
    """The same anatomies on every scanner.

    Attributes:
        volumes_AS1XYZ: as the encoder sees them; every scan has its own pose and noise.
        scanners: names, in the order of the second axis.
        age_A: years.
        male_A: 1 for M, 0 for F.
    """

    volumes_AS1XYZ: torch.Tensor
    scanners: tuple[str, ...]
    age_A: Floats
    male_A: Floats

    @torch.no_grad()
    def embed(self, model: Pretrainer) -> Floats:
        """(A, S, F) the representation of each anatomy on each scanner."""
        model.eval()
        return np.stack([model.encoder(volumes_S1XYZ).double().numpy() for volumes_S1XYZ in self.volumes_AS1XYZ])


def scan_counterfactual(
    age_A: Floats, settings: VolumeSettings, seed: int, scanners: Sequence[Scanner], told: Told
) -> Counterfactual:
    """Draw a healthy anatomy of each age and scan it on every scanner."""
    random = np.random.default_rng(seed)
    male_A = random.integers(0, 2, len(age_A)).astype(np.float64)
    volumes = np.zeros((len(age_A), len(scanners), 1, *settings.shape), np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "scan.nii"
        for a, (age, male) in enumerate(zip(age_A, male_A, strict=True)):
            told(f"scanning anatomy {a + 1} of {len(age_A)} on {len(scanners)} scanners")
            anatomy = draw_anatomy(random, float(age), "M" if male else "F", False)
            for s, scanner in enumerate(scanners):
                path.write_bytes(acquire(anatomy, scanner, random))
                # The cache of a site holds float16.
                volumes[a, s, 0] = load_volume(path, settings).astype(np.float16)
    return Counterfactual(
        volumes_AS1XYZ=torch.from_numpy(volumes),
        scanners=tuple(scanner.name for scanner in scanners),
        age_A=age_A,
        male_A=male_A,
    )


@dataclass(frozen=True)
class Components:
    """Variance components of a table of anatomies by scanners, (F,) each, without bias from mean squares.

    Attributes:
        scanner_F: between scanners.
        anatomy_F: between anatomies.
        rest_F: what pose, noise and the pair of anatomy and scanner add.
    """

    scanner_F: Floats
    anatomy_F: Floats
    rest_F: Floats


def components(h_ASF: Floats) -> Components:
    """Two-way analysis of variance without replication (scanners and anatomies as random effects)."""
    num_anatomies, num_scanners, _ = h_ASF.shape
    mean_F, by_anatomy_AF, by_scanner_SF = h_ASF.mean(axis=(0, 1)), h_ASF.mean(axis=1), h_ASF.mean(axis=0)
    rest_ASF = h_ASF - by_anatomy_AF[:, None] - by_scanner_SF + mean_F
    rest_F = np.square(rest_ASF).sum(axis=(0, 1)) / ((num_anatomies - 1) * (num_scanners - 1))
    scanner_F = np.square(by_scanner_SF - mean_F).sum(axis=0) / (num_scanners - 1) - rest_F / num_anatomies
    anatomy_F = np.square(by_anatomy_AF - mean_F).sum(axis=0) / (num_anatomies - 1) - rest_F / num_scanners
    return Components(scanner_F, anatomy_F, rest_F)


def counterfactual_share(h_ASF: Floats, about: Counterfactual, seen: Embeddings) -> Figure3:
    """The share that `explained_variance` is to find in a consortium, by the counterfactual table; jackknife over anatomies.

    The held-out subjects `seen` tell who is on which scanner at which age, and the unit of each feature; offsets and variances
    come from the counterfactual table alone.
    """
    one_hot_NS = (seen.scanner[:, None] == np.array(about.scanners)).astype(np.float64)
    design_NS = beyond(one_hot_NS, given_columns(seen.age_years, (seen.sex == "M").astype(np.float64)))
    weight_S = one_hot_NS.mean(axis=0)
    total_F = seen.h_NF.astype(np.float64).var(axis=0)
    varies_F = total_F > 0
    given_AQ = given_columns(about.age_A, about.male_A)

    def statistic(chosen: NDArray[np.intp]) -> float:
        table_ASF, given_aQ = h_ASF[chosen][:, :, varies_F], given_AQ[chosen]
        offset_SF = table_ASF.mean(axis=0)
        # What the error of the means adds to the variance between them.
        error_F = components(table_ASF).rest_F / len(chosen) * np.square(design_NS).sum() / len(design_NS)
        between_F = np.square(design_NS @ offset_SF).mean(axis=0) - error_F
        left_ASF = np.stack([beyond(table_ASF[:, s], given_aQ) for s in range(len(weight_S))], axis=1)
        free = len(chosen) - given_aQ.shape[1]
        within_F = np.einsum("s,asf->f", weight_S, np.square(left_ASF)) / free
        return planted_share(between_F, within_F, total_F[varies_F])

    num_anatomies = len(h_ASF)
    everyone = np.arange(num_anatomies)
    value = statistic(everyone)
    # A bootstrap repeats anatomies, which would pass for agreement within a scanner; the jackknife does not.
    left_out_A = np.array([statistic(np.delete(everyone, a)) for a in everyone])
    error = 1.96 * float(np.sqrt((num_anatomies - 1) * left_out_A.var()))
    return value, value - error, value + error


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """One encoder of images; a scanner counts as a site.

    Attributes:
        encoder: untrained or pretrained.
        planted: share of scanner by the counterfactual table, with its interval over anatomies.
        recovered: `explained_variance` of the observed consortium, with its interval over subjects.
        planted_erased: `planted` behind the eraser that the consortium's training subjects gave.
        erased: `recovered` behind it.
        scanner_left: share of the counterfactual variance between scanners that the eraser leaves.
        anatomy_kept: share of the counterfactual variance between anatomies that it leaves.
        oracle_anatomy_kept: the same for the directions in which scanners truly differ: what any projection costs.
        age_r2: from h, held-out subjects.
        age_r2_erased: behind the eraser.
        eraser_gap: `projector_gap` of the run's eraser; None for the untrained encoder, behind which a run fits none.
    """

    encoder: str
    planted: Figure3
    recovered: Figure3
    planted_erased: Figure3
    erased: Figure3
    scanner_left: float
    anatomy_kept: float
    oracle_anatomy_kept: float
    age_r2: float
    age_r2_erased: float
    eraser_gap: float | None


def study_encoder(
    name: str, model: Pretrainer, observed: Embeddings, about: Counterfactual, policy: MomentPolicy, of_run: Eraser | None
) -> ImageResult:
    """Hold what the consortium tells of an encoder against the same anatomies on every scanner."""
    by_scanner = replace(observed, site=observed.scanner)
    eraser = fitted_eraser(observed.h_NF.astype(np.float64), observed, policy)
    behind = replace(by_scanner, h_NF=eraser(torch.from_numpy(observed.h_NF)).numpy())
    table_ASF = about.embed(model)
    effect_SF = torch.from_numpy(table_ASF.mean(axis=0) - table_ASF.mean(axis=(0, 1))) / eraser.scale_F
    _, size_K, directions_KF = torch.linalg.svd(effect_SF, full_matrices=False)
    true_directions = replace(eraser, directions_KF=directions_KF[size_K > 1e-9 * size_K[0]])

    erased_ASF = eraser(torch.from_numpy(table_ASF)).numpy()
    before, after, best = (
        components(values_ASF / eraser.scale_F.numpy())
        for values_ASF in (table_ASF, erased_ASF, true_directions(torch.from_numpy(table_ASF)).numpy())
    )
    held_out = observed.split == "test"

    return ImageResult(
        encoder=name,
        planted=counterfactual_share(table_ASF, about, by_scanner.select(held_out)),
        recovered=recovered_share(by_scanner),
        planted_erased=counterfactual_share(erased_ASF, about, behind.select(held_out)),
        erased=recovered_share(behind),
        scanner_left=float(after.scanner_F.sum() / before.scanner_F.sum()),
        anatomy_kept=float(after.anatomy_F.sum() / before.anatomy_F.sum()),
        oracle_anatomy_kept=float(best.anatomy_F.sum() / before.anatomy_F.sum()),
        age_r2=age_fit(by_scanner)[0],
        age_r2_erased=age_fit(behind)[0],
        eraser_gap=None if of_run is None else projector_gap(of_run.directions_KF, eraser.directions_KF),
    )


def study_images(root: Path, told: Told, overrides: str, num_anatomies: int) -> list[ImageResult]:
    """The phantom consortium in `root` through the real apps, and both its encoders on so many anatomies on every scanner."""
    told("pretraining on the phantom consortium")
    with tempfile.TemporaryDirectory() as temporary:
        text = f"{overrides} data.root={json.dumps(str(root))}"
        config, checkpoints = run_apps(text, len(list_sites(root)), Path(temporary))
        of_run = Eraser(**last_state(checkpoints, "eraser"))
        states = {"untrained": last_state(checkpoints, "untrained"), "pretrained": last_state(checkpoints, "pretrain")}
    observed = {name: healthy_embeddings(config, state) for name, state in states.items()}
    first = observed["untrained"]
    ages = first.age_years[first.split == "test"]
    assert isinstance(config.data, ImageData)
    settings = VolumeSettings(
        voxel_size_mm=config.data.voxel_size_mm, shape=config.data.shape, normalisation=config.data.normalisation
    )
    scanners = [scanner for site in CONSORTIUM if site.name in PRETRAINING_SITES for scanner in site.scanners]
    drawn_A = np.random.default_rng(1).choice(ages, num_anatomies)
    about = scan_counterfactual(drawn_A, settings, 1, scanners, told)
    results = []
    for name, state in states.items():
        told(f"holding the {name} encoder against the truth")
        model = build_pretrainer(config.encoder, config.embedding_size, config.seed, num_classes=config.num_classes)
        load_strictly(model, state)
        policy = config.policy.moment_policy()
        results.append(study_encoder(name, model, observed[name], about, policy, of_run if name == "pretrained" else None))
    return results
