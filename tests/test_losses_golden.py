"""Objectives and debiasing against numbers: a small table that ships, and the authors' own code on hundreds of inputs."""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import core.losses
from core.losses import (
    AlignmentUniformity,
    BarlowTwins,
    DecoupledUniformity,
    EmbeddedViews,
    EnD,
    EpsSupInfoNCE,
    Exp,
    InfoNCE,
    Kernel,
    NTXent,
    Objective,
    ReleasedFairKL,
    SupCon,
    Threshold,
    YAware,
)
from core.losses.fairkl import gaussian_kl

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
HERE = GOLDEN.is_dir()
WHY_NOT = "../shared/golden is not here: the authors' numbers lie beside the checkout, not in it"

Arguments = dict[str, Any]
Inputs = dict[str, Tensor]
# Code of the SupCon family multiplies its losses by temperature / this.
BASE_TEMPERATURE = 0.07


def views_of(features_NVD: Tensor) -> list[Tensor]:
    return list(features_NVD.unbind(dim=1))


def classes(inputs: Inputs) -> dict[str, Tensor]:
    """Labels of the authors' cases; without any, no scan has a class and its own views alone are positives."""
    unknown = torch.full((len(inputs["features"]),), math.nan, dtype=torch.float64)
    return {"y": inputs.get("labels", unknown)}


def eps_supinfonce_out(args: Arguments, inputs: Inputs) -> Tensor:
    # Their epsilon is taken from the similarity already divided by the temperature, as our margin; all in units of theirs.
    objective = EpsSupInfoNCE(temperature=args["temperature"], margin=args["epsilon"], label="y", released=True)
    return objective.of(EmbeddedViews(views_of(inputs["features"]), classes(inputs)))


def eps_supinfonce_in(args: Arguments, inputs: Inputs) -> Tensor:
    objective = EpsSupInfoNCE(temperature=args["temperature"], margin=args["epsilon"], label="y", released=True, form="in")
    return objective.of(EmbeddedViews(views_of(inputs["features"]), classes(inputs)))


def eps_supcon(args: Arguments, inputs: Inputs) -> Tensor:
    objective = SupCon(temperature=args["temperature"], margin=args["epsilon"], label="y", released=True)
    return objective.of(EmbeddedViews(views_of(inputs["features"]), classes(inputs)))


def supcon_hobbitlong(args: Arguments, inputs: Inputs) -> Tensor:
    # No guard in the logarithm, so not our `released`; only their factor temperature / base temperature.
    anchors = {"all": "all", "one": "first_view"}[args["contrast_mode"]]
    objective = SupCon(temperature=args["temperature"], label="y", anchors=anchors)
    loss = objective.of(EmbeddedViews(views_of(inputs["features"]), classes(inputs)))
    return args["temperature"] / args["base_temperature"] * loss


def brainage_kernelized_supcon(args: Arguments, inputs: Inputs) -> Tensor:
    views = EmbeddedViews(views_of(inputs["features"]), classes(inputs))
    temperature = args["temperature"]
    if args["method"] == "supcon":
        # Their method "supcon" without labels is SimCLR.
        return temperature / BASE_TEMPERATURE * SupCon(temperature=temperature, label="y").of(views)
    # Their cauchy is 1 / (1 + sigma d^2): a bandwidth of sigma^-1/2 here.
    bandwidth = args["sigma"] ** -0.5 if args["kernel"] == "cauchy" else args["sigma"]
    kernel = Kernel(shape=args["kernel"], bandwidths={"y": bandwidth})
    objective: Objective = {
        "yaware": YAware(temperature=temperature, kernel=kernel, released="isbi2023"),
        "expw": Exp(temperature=temperature, kernel=kernel, released=True),
        "threshold": Threshold(temperature=temperature, kernel=kernel, released=args["delta_reduction"]),
    }[args["method"]]
    return objective.of(views)


def yaware_mic_cai2021(args: Arguments, inputs: Inputs) -> Tensor:
    # Two columns of labels, age and sex, share one sigma: a product of two kernels of that bandwidth.
    labels_NL = inputs["labels"].reshape(len(inputs["z_i"]), -1)
    metadata = {f"y{number}": label_N for number, label_N in enumerate(labels_NL.unbind(dim=1))}
    kernel = Kernel(shape=args["kernel"], bandwidths=dict.fromkeys(metadata, args["sigma"]))
    objective = YAware(temperature=args["temperature"], kernel=kernel, released="miccai2021")
    return objective(inputs["z_i"], inputs["z_j"], metadata)


def ntxent_yaware_repo(args: Arguments, inputs: Inputs) -> Tensor:
    # The sum of the two directions: twice our mean.
    return 2 * NTXent(temperature=args["temperature"])(inputs["z_i"], inputs["z_j"])


def nidl_yaware(args: Arguments, inputs: Inputs) -> Tensor:
    if "labels" not in inputs:
        # Without labels nidl takes the mean of the two directions: half the scale it has with labels.
        return NTXent(temperature=args["temperature"])(inputs["z1"], inputs["z2"])
    # nidl's gaussian is exp(-d^2 / 2H), our rbf, and its bandwidth H the square of ours, for every shape.
    shape = {"gaussian": "rbf"}.get(args["kernel"], args["kernel"])
    kernel = Kernel(shape=shape, bandwidths={"y": args["bandwidth"] ** 0.5})
    objective = YAware(temperature=args["temperature"], kernel=kernel, released="miccai2021")
    return objective(inputs["z1"], inputs["z2"], {"y": inputs["labels"].flatten()})


def nidl_infonce(args: Arguments, inputs: Inputs) -> Tensor:
    # The mean over the anchors of both views, as ours.
    return NTXent(temperature=args["temperature"])(inputs["z1"], inputs["z2"])


def nidl_barlow(args: Arguments, inputs: Inputs) -> Tensor:
    # Standardised with N - 1 and divided by N - 1: the same correlations; nothing is added to the variance.
    return BarlowTwins(redundancy_weight=args["lambd"], variance_epsilon=0.0)(inputs["z1"], inputs["z2"])


def nidl_alignment(_: Arguments, inputs: Inputs) -> Tensor:
    # Wang and Isola's: labels are unknown.
    return unlabelled_alignment_uniformity(1.0, 0.0, inputs["z1"], inputs["z2"])


def nidl_uniformity(_: Arguments, inputs: Inputs) -> Tensor:
    # Of the first view alone; ours, of two views, is the logarithm of the mean over both.
    return unlabelled_alignment_uniformity(0.0, 1.0, inputs["z1"])


def unlabelled_alignment_uniformity(alignment: float, uniformity: float, *views: Tensor) -> Tensor:
    objective = AlignmentUniformity(alignment_weight=alignment, uniformity_weight=uniformity, scale=2.0)
    return objective.of(EmbeddedViews(views, {"age_years": torch.full((len(views[0]),), math.nan)}))


def barlowtwins_fair(args: Arguments, inputs: Inputs) -> Tensor:
    # Their sum of squares as it is; the variance is a BatchNorm's, 1e-5 added.
    return BarlowTwins(redundancy_weight=args["lambd"])(inputs["z1"], inputs["z2"])


def decoupled_uniformity(args: Arguments, inputs: Inputs) -> Tensor:
    if args["kernel"] is None:
        return DecoupledUniformity(scale=args["t"]).of(EmbeddedViews(views_of(inputs["z"])))
    # A prior of several columns is a product of kernels of one sigma. They add lambda in float32.
    prior_NL = inputs["prior"].reshape(len(inputs["z"]), -1)
    metadata = {f"prior{number}": prior_N for number, prior_N in enumerate(prior_NL.unbind(dim=1))}
    kernel = Kernel(shape=args["kernel"], bandwidths=dict.fromkeys(metadata, args["sigma"]))
    regularisation = float(torch.tensor(args["lambda_"], dtype=torch.float32))
    objective = DecoupledUniformity(scale=args["t"], kernel=kernel, regularisation=regularisation)
    return objective.of(EmbeddedViews(views_of(inputs["z"]), metadata))


def fairkl_code(args: Arguments, inputs: Inputs) -> Tensor:
    # One row a scan; "kld" weighs the term of the standard deviations.
    debias = ReleasedFairKL(label="y", bias="b", temperature=args["temperature"], spread_weight=args["kld"])
    return debias.of(EmbeddedViews([inputs["feat"]], {"y": inputs["labels"], "b": inputs["bias_labels"]}))


def end_regu(args: Arguments, inputs: Inputs) -> Tensor:
    debias = EnD(label="y", bias="b", disentangle_weight=args["alpha"], entangle_weight=args["beta"], released=True)
    return debias.of(EmbeddedViews([inputs["feat"]], {"y": inputs["labels"], "b": inputs["bias_labels"]}))


def gauss_kl_oracle(_: Arguments, inputs: Inputs) -> Tensor:
    # Given by standard deviations, and summed over elements; ours takes variances.
    aligned, conflicting = (inputs["mu_a"], inputs["sd_a"].square()), (inputs["mu_c"], inputs["sd_c"].square())
    return gaussian_kl(*aligned, *conflicting).sum()


def pml_ntxent_supcon(args: Arguments, inputs: Inputs) -> Tensor:
    if "z1" in inputs:
        return NTXent(temperature=args["temperature"])(inputs["z1"], inputs["z2"])
    # One row a scan; their mean is over the anchors that have a positive, ours over all.
    label_N = inputs["labels"]
    share = ((label_N[:, None] == label_N[None, :]).sum(dim=1) > 1).double().mean()
    return SupCon(temperature=args["temperature"], label="y").of(EmbeddedViews([inputs["z"]], {"y": label_N})) / share


def lightly_losses(args: Arguments, inputs: Inputs) -> Tensor:
    # Means over the anchors of both views; decoupled contrastive learning is InfoNCE at an infinite margin.
    objective: Objective
    if "lambda_param" in args:
        objective = BarlowTwins(redundancy_weight=args["lambda_param"])
    elif args["decoupled"]:
        objective = InfoNCE(temperature=args["temperature"], margin=math.inf)
    else:
        objective = NTXent(temperature=args["temperature"])
    return objective(inputs["z1"], inputs["z2"])


FAMILIES: dict[str, Callable[[Arguments, Inputs], Tensor]] = {
    "eps_supinfonce_out": eps_supinfonce_out,
    "eps_supinfonce_in": eps_supinfonce_in,
    "eps_infonce_contrastive": eps_supinfonce_out,
    "eps_supcon": eps_supcon,
    "supcon_hobbitlong": supcon_hobbitlong,
    "brainage_kernelized_supcon": brainage_kernelized_supcon,
    "yaware_micCAI2021": yaware_mic_cai2021,
    "ntxent_yaware_repo": ntxent_yaware_repo,
    "nidl_yaware": nidl_yaware,
    "nidl_infonce": nidl_infonce,
    "nidl_barlow": nidl_barlow,
    "nidl_align_unif": nidl_alignment,
    "barlowtwins_fair": barlowtwins_fair,
    "decoupled_uniformity": decoupled_uniformity,
    "fairkl_code": fairkl_code,
    "end_regu": end_regu,
    "gauss_kl_oracle": gauss_kl_oracle,
    "pml_ntxent_supcon": pml_ntxent_supcon,
    "lightly_losses": lightly_losses,
}
NUM_CASES = {
    "eps_supinfonce_out": 46,
    "eps_supinfonce_in": 44,
    "eps_infonce_contrastive": 43,
    "eps_supcon": 44,
    "supcon_hobbitlong": 81,
    "brainage_kernelized_supcon": 167,
    "yaware_micCAI2021": 65,
    "ntxent_yaware_repo": 2,
    "nidl_yaware": 22,
    "nidl_infonce": 6,
    "nidl_barlow": 9,
    "nidl_align_unif": 3,
    "barlowtwins_fair": 9,
    "decoupled_uniformity": 46,
    "fairkl_code": 65,
    "end_regu": 14,
    "gauss_kl_oracle": 2,
    "pml_ntxent_supcon": 7,
    "lightly_losses": 17,
}
# VICReg is none of our objectives.
LEFT_OUT = {"lightly_losses": "vicreg"}
# Families of other parts: exchange, harmonisation, evaluation, and bins of age, of which no case is kept.
NOT_LOSSES = {
    "brainage_bin_age",
    "combat",
    "fedema_easyfl",
    "fedharmony_confusion",
    "fedharmony_fedprox",
    "fedx",
    "ramp_challenge",
}


@dataclass(frozen=True)
class Case:
    """One call of the authors' code: its arguments, and by name the arrays that went in and came out."""

    family: str
    name: str
    args: Arguments
    gradients: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def array(self, kind: str, name: str) -> Tensor:
        """An array of the case, of kind in, out or grad."""
        return torch.from_numpy(np.asarray(arrays_of(self.family)[f"{self.name}/{kind}/{name}"]))

    def inputs(self) -> Inputs:
        start = f"{self.name}/in/"
        names = [key.removeprefix(start) for key in arrays_of(self.family) if key.startswith(start)]
        return {name: self.array("in", name).requires_grad_(name in self.gradients) for name in names}

    @property
    def tolerance(self) -> float:
        """Relative: EnD and the cases so named were computed in float32."""
        return 1e-5 if self.name.startswith("f32") or self.family == "end_regu" else 1e-9


@functools.cache
def arrays_of(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{family}.npz") as arrays:
        return dict(arrays)


def index_of(family: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / f"{family}.json").read_text())["cases"]
    return cases


def cases_of(family: str) -> list[Case]:
    """All cases of a family but those left out."""
    kept = [case for case in index_of(family) if not (family in LEFT_OUT and case["id"].startswith(LEFT_OUT[family]))]
    named = [Case(family, case["id"], case["args"], tuple(case["grad"])) for case in kept]
    if family == "lightly_losses":
        for case in named:
            case.args["decoupled"] = case.name.startswith("dcl")
    return named


CASES = [case for family in FAMILIES for case in cases_of(family)] if HERE else []
with_golden = pytest.mark.skipif(not HERE, reason=WHY_NOT)


def kernelized_supcon(args: Arguments, inputs: Inputs) -> float:
    """KernelizedSupCon row by row, 0 for an anchor without positives and for one that nothing repels, where theirs is NaN."""
    rows_RD = np.concatenate([view.detach().numpy() for view in views_of(inputs["features"])])
    if inputs.get("labels") is None:
        return 0.0  # the one such case has a single view: no anchor has a positive
    age_R = np.tile(inputs["labels"].numpy(), inputs["features"].shape[1])
    squares_RR, sigma = (age_R[:, None] - age_R[None, :]) ** 2, args["sigma"]
    kernel_RR = 1 / (1 + sigma * squares_RR) if args["kernel"] == "cauchy" else np.exp(-squares_RR / (2 * sigma**2))
    if args["kernel"] == "gaussian":
        kernel_RR /= math.sqrt(2 * math.pi) * sigma
    total = 0.0
    for i, anchor_D in enumerate(rows_RD):
        others = np.arange(len(rows_RD)) != i
        logits, weights = (rows_RD[others] @ anchor_D - 1) / args["temperature"], kernel_RR[i, others]
        if args["method"] == "threshold":
            nearer = (kernel_RR[others] < kernel_RR[others, i, None]).sum(axis=1)
            repulsion = (nearer * np.exp(logits)).sum() / (len(rows_RD) if args["delta_reduction"] == "mean" else 1)
        elif args["method"] == "expw":
            repulsion = np.exp(logits * (1 - weights)).sum()
        else:
            repulsion = np.exp(logits).sum()
        if repulsion > 0 and weights.sum() > 0:
            total -= (weights * (logits - math.log(repulsion))).sum() / weights.sum()
    return args["temperature"] / BASE_TEMPERATURE * total / len(rows_RD)


def where_theirs_is_not_finite(case: Case, inputs: Inputs) -> float:
    """What we say instead."""
    match case.family:
        case "eps_supinfonce_in":
            return 0.0  # no anchor of these cases has a positive
        case "brainage_kernelized_supcon":
            return kernelized_supcon(case.args, inputs)
        case "fairkl_code":
            return 1.0  # a single scan: its similarity to itself, squared, and no spread
    raise AssertionError(f"{case}: theirs is not finite, and nothing is said of ours")


def on_the_tangent(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient - (gradient * rows).sum(dim=-1, keepdim=True) * rows


@with_golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_those_of_the_authors(case: Case) -> None:
    inputs = case.inputs()
    loss = FAMILIES[case.family](case.args, inputs)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in case.gradients]) if case.gradients else ()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    theirs = float(case.array("out", "alignment" if case.family == "nidl_align_unif" else "loss"))
    if not math.isfinite(theirs):
        assert float(loss.detach()) == pytest.approx(where_theirs_is_not_finite(case, inputs), rel=1e-9, abs=1e-12)
        return
    assert float(loss.detach()) == pytest.approx(theirs, rel=case.tolerance, abs=1e-3 * case.tolerance)
    for name, gradient in zip(case.gradients, gradients, strict=True):
        expected, rows = case.array("grad", name), inputs[name].detach()
        # Their gradients are with respect to rows that their caller had brought to unit length, ours go through the length.
        unit = rows.ndim > 1 and bool(((rows.norm(dim=-1) - 1).abs() < 1e-5).all())
        if unit and "barlow" not in str(case):
            gradient, expected = (on_the_tangent(one, rows) for one in (gradient, expected))
        assert float((gradient - expected).norm()) <= case.tolerance * max(float(expected.norm()), 1e-2)


@with_golden
@pytest.mark.parametrize("case", cases_of("nidl_align_unif") if HERE else [], ids=str)
def test_uniformity_is_that_of_the_authors(case: Case) -> None:
    assert float(nidl_uniformity(case.args, case.inputs())) == pytest.approx(float(case.array("out", "uniformity")), rel=1e-9)


@with_golden
def test_what_we_say_where_theirs_is_not_finite_is_theirs_elsewhere() -> None:
    finite = 0
    for case in cases_of("brainage_kernelized_supcon"):
        theirs = float(case.array("out", "loss"))
        if math.isfinite(theirs) and case.args["method"] != "supcon":
            assert kernelized_supcon(case.args, case.inputs()) == pytest.approx(theirs, rel=1e-9), case
            finite += 1
    assert finite == 133


@with_golden
def test_no_case_is_left_out_silently() -> None:
    assert {path.stem for path in GOLDEN.glob("*.npz")} == FAMILIES.keys() | NOT_LOSSES
    assert {family: len(index_of(family)) for family in FAMILIES} == NUM_CASES
    left_out = Counter(NUM_CASES)
    left_out.subtract(Counter(case.family for case in CASES))
    assert +left_out == {"lightly_losses": 5}


TABLE = json.loads((Path(__file__).parent / "golden_table.json").read_text())["entries"]


def number(value: Any) -> Any:
    return math.inf if value == "inf" else value


def built(entry: dict[str, Any]) -> Any:
    """The objective, or debiasing, that an entry names, with its options."""
    options = {name: number(value) for name, value in entry["options"].items()}
    if "kernel" in options:
        options["kernel"] = Kernel(**options["kernel"])
    if "weak" in options:
        options["weak"] = built({"objective": options["weak"]["objective"], "options": options["weak"]["options"]})
    return getattr(core.losses, entry["objective"])(**options)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry["id"])
def test_the_table_that_ships(entry: dict[str, Any]) -> None:
    views = [torch.tensor(view, dtype=torch.float64) for view in entry["views"]]
    # None, null in the file, is an unknown label.
    metadata = {name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in entry.get("metadata", {}).items()}
    loss = built(entry).of(EmbeddedViews(views, metadata))
    assert float(loss) == pytest.approx(entry["loss"], rel=1e-9, abs=1e-12)


def test_every_objective_and_every_debiasing_is_in_the_table() -> None:
    losses = {name for name in core.losses.__all__ if name not in ("OBJECTIVES", "EmbeddedViews", "Kernel", "Objective")}
    assert losses == {entry["objective"] for entry in TABLE}
    assert len({entry["id"] for entry in TABLE}) == len(TABLE)
    assert all(len(entry["why"]) > 20 for entry in TABLE)
