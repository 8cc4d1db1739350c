"""The model card of an export, and what of a run's configuration may be told: no name of a site, no path.

Site names are known from the run's folder and configuration; what a user could have typed freely is searched for them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import __version__
from core.data.preflight import ROUND_TO, rounded
from core.evaluation.intervals import Evaluation, read_metrics
from core.evaluation.reading import ROLES
from core.evaluation.words import chance_beside, find, with_interval
from core.privacy import NOT_COVERED

SITES = "sites.json"
NEVER_TOLD = (
    ("data", "pretrain_sites"),
    ("data", "unseen_sites"),
    ("data", "target_sites"),
    ("data", "pattern"),
    ("data", "columns", "site_pattern"),
    ("output",),
    ("start",),
    ("start_keys",),
)
FREE_TEXT = (
    ("name",),
    ("data", "name"),
    ("data", "suffix"),
    ("data", "derivatives"),
    ("data", "columns"),
    ("finetune", "target"),
)
TASKS = ("site", "scanner", "age", "sex", "diagnosis")
FLOOR = "age_sex_floor"


@dataclass(frozen=True)
class SiteNames:
    """The names that must not be told."""

    names: frozenset[str]

    @classmethod
    def of_run(cls, run: Path, config: Mapping[str, Any]) -> "SiteNames":
        """All that the run's folder and its configuration tell of."""
        data = config["data"]
        names = {name for key in ("pretrain_sites", "unseen_sites", "target_sites") for name in data.get(key) or ()}
        names |= {name for role in _read(run / ROLES, {}).values() for name in role}
        names |= {str(site["name"]) for site in _read(run / SITES, [])}
        for line in _rounds(run):
            names |= line["sites"].keys()
        return cls(frozenset(names))

    def occur_in(self, text: str) -> bool:
        """Whether one of them stands in the text as a word of its own, in small or large letters."""
        return any(re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, re.IGNORECASE) for name in self.names)

    def taken_out(self, value: Any) -> Any:
        """The value with None for each text that holds one; a list without them; a key that is one is left out."""
        match value:
            case str():
                return None if self.occur_in(value) else value
            case list():
                return [item for item in map(self.taken_out, value) if item is not None]
            case dict():
                return {key: self.taken_out(item) for key, item in value.items() if not self.occur_in(str(key))}
        return value


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def _rounds(run: Path) -> list[dict[str, Any]]:
    """What each round told, in order."""
    path = run / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def public_config(config: Mapping[str, Any], names: SiteNames) -> dict[str, Any]:
    """A checkpoint's configuration without names of sites and without what tells how files are found."""
    public = deepcopy(dict(config))
    for *parents, key in NEVER_TOLD:
        _below(public, parents).pop(key, None)
    for *parents, key in FREE_TEXT:
        if key in (tree := _below(public, parents)):
            tree[key] = names.taken_out(tree[key])
    return public


def _below(tree: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        tree = tree.get(key) or {}
    return tree


def model_card(
    run: Path,
    about: Mapping[str, Any],
    digests: Mapping[str, str],
    *,
    has_bundle: bool,
    left_out: Sequence[str],
) -> str:
    """README.md of an export.

    Args:
        run: the run's folder.
        about: what stands beside the exported weights.
        digests: SHA-256 of files by name.
        has_bundle: whether there is a MONAI bundle.
        left_out: parts of the checkpoint that are not exported.
    """
    title = about["config"].get("name")
    parts = [
        f"# Encoder {title}" if title else "# Encoder of an Isocenter run",
        _summary(about),
        "## Use",
        _use(about, has_bundle),
        "## Intended use and limits",
        "Research only. This is no medical device: it must not be used to diagnose, to treat or to decide about a person. It was "
        "trained on the scans told of below; at other scanners, ages and diseases it may fail without a sign. What it knows of "
        "site, scanner, age and sex is measured below and is not nothing.",
        "## Input",
        _input(about),
        "## Output",
        _output(about, left_out),
        "## Training",
        _training(about),
        "### Sites",
        site_table(run),
        "## Figures",
        figure_table(run, about),
        "## Privacy",
        privacy(run, about),
        "## Licence",
        "Choose one before you publish. The weights stem from the scans of the sites above: ask them first.",
        "## Versions and files",
        _versions(about),
        "\n".join(["| file | SHA-256 |", "|---|---|", *(f"| {name} | {digest} |" for name, digest in digests.items())]),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(about: Mapping[str, Any]) -> str:
    what = {"images": "a volume of a head", "medmnist": "an image", "table": "a row of features"}[about["input"]["kind"]]
    return (
        f"It makes {about['num_features']} numbers, the representation h, of {what}. It was trained by Isocenter over the sites "
        "below."
    )


def _use(about: Mapping[str, Any], has_bundle: bool) -> str:
    lines = [
        "```python",
        "import core  # Isocenter; torch and safetensors are all that this needs",
        "",
        'encoder = core.load_encoder("this/folder")  # erased=False: h before site and scanner are erased',
        "",
        "import torch  # or without Isocenter",
        "",
        'encoder = torch.jit.load("this/folder/encoder.pt")',
        "```",
    ]
    if about["encoder"]["name"] in ("densenet121", "resnet18"):
        lines += ["", "The net is MONAI's: core.load_encoder needs MONAI too, encoder.pt does not."]
    if has_bundle:
        lines += ["", "`bundle/` is a MONAI bundle from NIfTI files to h; bundle/docs/README.md tells how to run it."]
    else:
        lines += ["", "There is no MONAI bundle: this encoder does not take volumes from NIfTI files."]
    return "\n".join(lines)


def _input(about: Mapping[str, Any]) -> str:
    given, num_inputs = about["input"], about["num_inputs"]
    if given["kind"] == "table":
        return (
            f"Rows (N, {num_inputs}), float32: {num_inputs} features in the order of their names as Python sorts them, in the "
            "unit that the sites' tables have, NaN where a value is missing. Standardisation is part of the encoder. "
            "The names themselves are not kept by a run: take them from the table that it read."
        )
    if given["kind"] == "medmnist":
        shape = ", ".join(["N", str(num_inputs), *"XYZ"[: about["spatial_dims"]]])
        return (
            f"Images ({shape}), float32, from 0 to 1: a MedMNIST picture divided by 255, its first axis from left to right, at "
            "the number of pixels that the run read."
        )
    x, y, z = given["shape"]
    scaled = (
        "scaled by y = clip((v - p2) / (q - p2), 0, 1), with p2 and p98 percentiles of the values v inside the grid and q the "
        "99.5 percentile of those above p2 + 0.1 (p98 - p2)"
        if given["normalisation"] == "robust"
        else "with the values as stored"
    )
    return f"""Volumes (N, {num_inputs}, {x}, {y}, {z}), float32, of cubic voxels of {given["voxel_size_mm"]:g} mm: axes permuted
and flipped to the nearest right-anterior-superior order, not rotated; the centre of the image is that of the grid; averaged in
blocks where the image is twice as fine or more, then interpolated linearly; {scaled}; 0 outside the image; rounded to
{given["stored"]}.

```python
from pathlib import Path

import torch
from core.data.volumes import VolumeSettings, load_volume

settings = VolumeSettings(voxel_size_mm={given["voxel_size_mm"]}, shape=({x}, {y}, {z}), normalisation="{given["normalisation"]}")
h = encoder(torch.from_numpy(load_volume(Path("scan.nii.gz"), settings))[None, None])
```

Where sites blanked what is outside a mask (data.mask), do so too: the mask is not part of a run."""


def _output(about: Mapping[str, Any], left_out: Sequence[str]) -> str:
    erased = about["erased_directions"]
    lines = [f"h, (N, {about['num_features']}), float32."]
    if erased["inputs"]:
        lines.append(f"Of the standardised inputs {erased['inputs']} directions of site and scanner are erased.")
    if erased["h"]:
        lines.append(
            f"Of h {erased['h']} directions are erased, in which scanners differed at equal age, sex and diagnosis: an affine "
            "map behind the encoder, which needs no site when it is used."
        )
    if about["head"] == "linear":
        told = "what the run calls its target" if about["target"] is None else f"the target {_words(about['target'])}"
        lines.append(
            f"encoder.safetensors also has the head that was trained for {told}: names beginning with `head.`, "
            f"{about['num_outputs']} outputs, a linear map of `torch.nn.functional.layer_norm(h, h.shape[1:])`."
        )
    elif about["head"]:
        lines.append(
            "encoder.safetensors also has the decoder that was trained to segment: names beginning with `head.`, for Isocenter's "
            "`core.models`; encoder.pt does not."
        )
    if left_out:
        lines.append(f"Other parts of the checkpoint are not exported: {', '.join(left_out)}.")
    return " ".join(lines)


def _training(about: Mapping[str, Any]) -> str:
    config, debias = about["config"], about["config"]["debias"]
    what = {
        "fairkl": f"FairKL against site and scanner, weight {debias.get('weight')}",
        "erasure": "erasure of site and scanner alone",
        "none": "none",
    }.get(debias["name"], debias["name"])
    rows = [
        ("encoder", _words(about["encoder"])),
        *([("began with", _begun(config["begun_with"]))] if "begun_with" in config else []),
        *(
            [
                ("objective", _words(about["objective"])),
                ("pretrained on", {"all": "all scans"}.get(config["data"].get("pretrain_on", ""), "scans of healthy controls")),
                ("debiasing", what),
                (
                    "rounds of pretraining",
                    f"{about['rounds']}, {config['local_steps']} steps of {config['batch_size']} scans each",
                ),
            ]
            if config["num_rounds"]
            else []
        ),
        ("directions erased", f"{about['erased_directions']['inputs']} of the inputs, {about['erased_directions']['h']} of h"),
        ("stage exported", f"{about['stage']}, round {about['round']}{', one site alone' if about['one_site_alone'] else ''}"),
        ("seed", str(config["seed"])),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


def _begun(start: Mapping[str, Any]) -> str:
    """How the encoder that training began with was pretrained."""
    if start["objective"] is None:
        return "an encoder of others, of which nothing is known here"
    scans = {"all": "all scans"}.get(start["pretrain_on"], "scans of healthy controls")
    return (
        f"an encoder pretrained in another run: {_words(start['objective'])}, debiasing {start['debias']['name']}, "
        f"{start['num_rounds']} rounds of {start['local_steps']} steps of {start['batch_size']} scans, on {scans}"
    )


def _words(settings: Mapping[str, Any]) -> str:
    """A choice and its settings in a line."""
    given = {key: value for key, value in settings.items() if key != "name" and value is not None}
    text = ", ".join(f"{key} {json.dumps(value)}" for key, value in given.items())
    return f"{settings['name']} ({text})" if "name" in settings and text else settings.get("name") or text


def site_table(run: Path) -> str:
    """The sites by role and size, without their names, counts rounded."""
    found = _read(run / SITES, None)
    if found is None:
        roles = _read(run / ROLES, {})
        told = ", ".join(f"{len(sites)} {role}" for role, sites in roles.items()) or "none told"
        return f"The run's folder has no {SITES}, so that only roles are known: {told}."
    ordered = sorted(found, key=lambda site: (site["role"], -int(site["subjects"]), -int(site["scans"]), int(site["scanners"])))
    rows = [
        f"| site {number} | {site['role']} | {rounded(site['subjects'])} | {rounded(site['scans'])} | {site['scanners']} |"
        for number, site in enumerate(ordered, start=1)
    ]
    note = f"Counts are rounded to {ROUND_TO}, small ones hidden; the order is that of roles and sizes."
    return "\n".join(["| | role | subjects | scans | scanners |", "|---|---|---|---|---|", *rows]) + f"\n\n{note}"


def figure_table(run: Path, about: Mapping[str, Any]) -> str:
    """Figures of what is exported over all sites, beside floor and chance; why there are none."""
    delivered = {"pretrain": "pretrained"}.get(about["stage"], about["stage"])
    if about["erased_directions"]["h"]:
        delivered = "erased"
    if not (run / "metrics.json").is_file():
        return "The run has no metrics.json: nothing was evaluated."
    try:
        evaluations = read_metrics(run / "metrics.json")
    except (ValueError, TypeError) as error:
        return f"The run's metrics.json cannot be read by Isocenter {__version__}: {type(error).__name__}."
    of_all = [e for e in evaluations if e.site == "all"]
    shown = {(e.task, e.metric): e for e in reversed(of_all) if e.stage == delivered}
    if not shown:
        return f"The run's metrics.json has no figure of the stage {delivered} over all sites."
    rows = [_figure_row(of_all, shown[key]) for key in sorted(shown, key=_order)]
    head = [
        "| what | metric | value [95 % interval] | floor: age and sex alone | chance | held-out subjects |",
        "|---|---|---|---|---|---|",
    ]
    note = (
        f"Stage {delivered}, as the run evaluated it, on held-out subjects; intervals by resampling them. Site and scanner "
        "should be near their floor. mae is in years; names of metrics are those of metrics.json."
    )
    if views := (about["config"].get("finetune") or {}).get("test_time_views"):
        note += f" Scores of the head are means over a scan and {views} random views of it; this model tells of the scan alone."
    return "\n".join([*head, *rows]) + f"\n\n{note}"


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    task, metric = key
    return (TASKS.index(task) if task in TASKS else len(TASKS), task, metric)


def _figure_row(evaluations: Sequence[Evaluation], e: Evaluation) -> str:
    floor, chance = find(evaluations, FLOOR, e.task, e.metric), chance_beside(evaluations, e)
    beside = " | ".join("" if other is None else with_interval(other) for other in (floor, chance))
    return f"| {e.task} | {e.metric} | {with_interval(e)} | {beside} | {rounded(e.num_subjects)} |"


def privacy(run: Path, about: Mapping[str, Any]) -> str:
    """What was claimed, and what was not."""
    chosen = about["config"].get("privacy") or {"name": "none"}
    leaks = "Weights can leak what they were trained on: treat them as personal data."
    if chosen["name"] == "clip_and_noise":
        return (
            f"No differential privacy is claimed. Every update that left a site was hardened: {_words(chosen)}. One site is not "
            f"a crowd to hide in. {leaks}"
        )
    if chosen["name"] != "dp_sgd" or about["head"] is None:
        return f"No differential privacy is claimed for these weights. {leaks}"
    spent: dict[str, Mapping[str, Any]] = {}
    for line in _rounds(run):
        if line["stage"].partition("-")[0] == about["stage"]:
            spent |= line.get("privacy", {})
    known = [site for site in spent.values() if site.get("epsilon") is not None]
    if not known or len(known) < len(spent):
        return (
            f"No differential privacy is claimed: the run asked for {_words(chosen)}, and does not tell of noise at every site. "
            f"{leaks}"
        )
    return (
        f"Fine-tuning was private, {_words(chosen)}. At each of {len(known)} sites this stage is "
        f"({max(site['epsilon'] for site in known):.2f}, {max(site['delta'] for site in known):g})-differentially private for a "
        "subject with all scans, present or missing (zero-out adjacency); what several stages of a run spend adds up. "
        f"Not covered by it: {'; '.join(NOT_COVERED)}."
    )


def _versions(about: Mapping[str, Any]) -> str:
    exported, trained = (
        ", ".join(f"{name} {number}" for name, number in sorted(about[key].items())) for key in ("versions", "trained_with")
    )
    return f"Trained with {trained}; exported with {exported}; format {about['format']}. `config.json` holds the run's settings."
