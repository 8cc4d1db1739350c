"""A run's encoder for others: weights, a TorchScript module, a model card, a MONAI bundle; and what loads it all again.

To load an encoder torch and safetensors are enough; everything else is imported where a folder is written.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from core import __version__
from core.checkpoint import last_checkpoints
from core.erasure import Eraser
from core.models import Encoder, EncoderChoice, RowEncoder, Standardise

FORMAT = 1
"""Of checkpoints and exports; one without a number is of this format."""
ENCODERS = {choice.name: choice for choice in get_args(EncoderChoice)}
PRETRAINED = "pretrain"
"""The stage of pretraining; an eraser belongs to it."""
WEIGHTS, MODULE, CONFIG, CARD, BUNDLE = "encoder.safetensors", "encoder.pt", "config.json", "README.md", "bundle"
SAME_H = 1e-6
"""Largest difference of h between the module and its TorchScript, in units of the largest h."""
TRIED_BATCHES = (1, 3)

State = dict[str, Tensor]


class ExportError(ValueError):
    """What cannot be exported or loaded; one line that says what to change."""


class ErasedEncoder(Encoder):
    """An encoder with the eraser of site and scanner behind it.

    Args:
        encoder: gives h (N, F).
        eraser: affine map of h.
    """

    mean_F: Tensor
    scale_F: Tensor
    directions_KF: Tensor

    def __init__(self, encoder: Encoder, eraser: Eraser) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.num_features
        for name, value in vars(eraser).items():
            self.register_buffer(name, value.float())

    @property
    def parts(self) -> list[nn.Module]:
        """Those of the encoder."""
        return self.encoder.parts

    @property
    def input_scale(self) -> Tensor:
        """That of the encoder."""
        return self.encoder.input_scale

    @property
    def pyramid_channels(self) -> tuple[int, ...]:
        """Those of the encoder."""
        return self.encoder.pyramid_channels

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """That of the encoder: only h is erased."""
        return self.encoder.pyramid(images)

    def forward(self, inputs: Tensor) -> Tensor:
        """Representations h without the erased directions, (N, F)."""
        return Eraser(self.mean_F, self.scale_F, self.directions_KF)(self.encoder(inputs))


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        file: where it was read.
        state: weights by name, each beginning with ``encoder.``, ``head.``, ``eraser.`` or another part's name.
        about: what is written beside the weights: stage, round, config, versions.
    """

    file: Path
    state: State
    about: dict[str, Any]

    def part(self, name: str) -> State:
        """The weights of one part, by their names in it."""
        return {key.removeprefix(f"{name}."): value for key, value in self.state.items() if key.startswith(f"{name}.")}


def load_encoder(path: Path | str, *, erased: bool = True) -> Encoder:
    """The encoder of an export, a run or a checkpoint: on the CPU, in eval mode, with ``num_features``.

    It takes volumes (N, C, X, Y, Z), images (N, C, X, Y) or rows (N, I) and gives h, (N, F). Nothing in a file is executed, and
    only torch and safetensors are needed; the nets of MONAI need MONAI too.

    Args:
        path: folder of an export or its encoder.safetensors; folder of a run, of which the last pretrained encoder is taken; or
            a checkpoint of a run.
        erased: whether the run's eraser of site and scanner, where there is one, acts on h; False gives the encoder's own h.

    Raises:
        ExportError: there is no encoder of Isocenter, it is of another format, or does not fit its own description; or it needs
            a package that is not installed.
    """
    stored = read(_last_pretrained(Path(path)))
    encoder, eraser = build(stored), eraser_of(stored)
    return (ErasedEncoder(encoder, eraser) if erased and eraser is not None else encoder).eval()


def export_run(run: Path, output: Path | None = None, *, stage: str | None = None) -> Path:
    """Write the folder that makes a run's encoder usable elsewhere; no name of a site and no path is in it.

    Args:
        run: folder of a run.
        output: new or empty folder; None: ``export`` in the run's.
        stage: None: the pretrained encoder, with the eraser if the run erased; else a stage with a checkpoint in the run, such
            as ``full_finetuning``: its encoder and its head.

    Returns:
        The folder: encoder.safetensors, encoder.pt (TorchScript), config.json, README.md, and for volumes a MONAI bundle.

    Raises:
        ExportError: the folder is no run's, has no such stage, or its weights are unusable; the output folder holds something.
            Nothing is written then.
    """
    from core.export_bundle import bundle_files
    from core.export_card import SiteNames, model_card, public_config

    stored = read(_checkpoint(run, stage))
    encoder, eraser, head = build(stored), eraser_of(stored), stored.part("head")
    target_folder = run / "export" if output is None else output
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise ExportError(
            f"export: the output folder must be new or empty, {target_folder.name} is not. Remove it, or name "
            "another with --output."
        )

    names = SiteNames.of_run(run, stored.about["config"])
    config = public_config(stored.about["config"], names)
    about = describe(stored, encoder, eraser, config)
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {} if eraser is None else {f"eraser.{name}": value for name, value in vars(eraser).items()}
    tensors |= {f"head.{name}": value for name, value in head.items()}
    module = ErasedEncoder(encoder, eraser) if eraser is not None else encoder
    files = {
        WEIGHTS: save(
            {name: value.contiguous() for name, value in tensors.items()}, {"isocenter": json.dumps(about, sort_keys=True)}
        ),
        MODULE: torchscript(module.eval(), example_shape(about)),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    bundle = bundle_files(about, files[MODULE])
    files |= {f"{BUNDLE}/{name}": data for name, data in bundle.items()}
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in (WEIGHTS, MODULE)}
    others = sorted({name.partition(".")[0] for name in stored.state} - {"encoder", "head", "eraser"})
    files[CARD] = model_card(run, about, digests, has_bundle=bool(bundle), left_out=others).encode()
    _write_whole(target_folder, files)
    return target_folder


def read(file: Path) -> Stored:
    """A checkpoint or an exported file, its weights checked to be finite.

    Raises:
        ExportError: it is neither, of another format, or holds weights that are not finite.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # Clones: the file may go away while the tensors are in use.
            state: State = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{file.name}: it must be a whole .safetensors file, got {type(error).__name__}. Copy it again, or name another."
        ) from None
    about = json.loads(metadata.get("isocenter", "null"))
    if not isinstance(about, dict) or not {"stage", "round", "config", "versions"} <= about.keys():
        raise ExportError(
            f"{file.name}: it must be a checkpoint or an export of Isocenter, got the metadata {sorted(metadata)}. Name another "
            "file, or begin a run with these weights: start=FILE."
        )
    if (found := about.get("format", FORMAT)) != FORMAT:
        raise ExportError(
            f"{file.name}: the format must be {FORMAT}, got {found!r}. Use the Isocenter that wrote it, "
            f"{about['versions'].get('isocenter')}."
        )
    bad = sorted(name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all())
    if bad:
        raise ExportError(
            f"{file.name}: weights must be finite, {bad[0]} and {len(bad) - 1} others are not. Take the checkpoint of another "
            "round."
        )
    return Stored(file, state, about)


def build(stored: Stored) -> Encoder:
    """The encoder that the configuration names, with the weights of the file.

    Raises:
        ExportError: the file has no encoder, one that is unknown, or one that needs a package that is not installed.
    """
    name, state = stored.file.name, stored.part("encoder")
    if not state:
        raise ExportError(f"{name}: it must hold an encoder, got the stage {stored.about['stage']!r}. Name another checkpoint.")
    settings = dict(stored.about["config"]["encoder"])
    kind = ENCODERS.get(settings.pop("name"))
    try:
        choice = None if kind is None else kind(**settings)
    except (TypeError, ValueError):
        choice = None
    if choice is None:
        raise ExportError(
            f"{name}: the encoder must be one of {sorted(ENCODERS)} with its settings, got "
            f"{stored.about['config']['encoder']!r}. Use the Isocenter that wrote it."
        )
    try:
        # Without memory and random numbers: every weight comes from the file.
        with torch.device("meta"):
            first, shape = next((key, value.shape) for key, value in choice.build(1, 3).named_parameters() if value.ndim > 1)
            shape = state[first].shape if first in state else shape
            encoder: Encoder = choice.build(shape[1], max(2, len(shape) - 2))
            if isinstance(encoder, RowEncoder):
                encoder.standardise = Standardise(shape[1], shape[0])
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{name}: encoder {choice.name} is a net of MONAI, and {str(error.name).partition('.')[0]} is not installed. Install "
            f"it, or export the run where it is and load {MODULE} with torch.jit.load, which needs torch alone."
        ) from None
    try:
        encoder.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())[:200]
        raise ExportError(f"{name}: its weights must be those of {choice!r}, got: {found}. Name another file.") from None
    return encoder


def eraser_of(stored: Stored) -> Eraser | None:
    """The eraser in the file, or of the same round beside a checkpoint of pretraining; None where nothing was erased.

    Raises:
        ExportError: as `read`.
    """
    parts = stored.part("eraser")
    beside = stored.file.with_name(f"eraser-{stored.about['round']:04d}.safetensors")
    if not parts and stored.about["stage"] == PRETRAINED and stored.file.name.startswith(PRETRAINED) and beside.is_file():
        parts = read(beside).state
    return Eraser(**parts) if parts else None


def _last_pretrained(path: Path) -> Path:
    if path.is_file():
        return path
    exported = path / WEIGHTS
    return exported if exported.is_file() else _checkpoint(path, None)


def _checkpoint(run: Path, stage: str | None) -> Path:
    """The last checkpoint of a stage of a run; of pretraining where no stage is named."""
    found = last_checkpoints(run)
    found.pop("eraser", None)
    if not found:
        what = "a folder without checkpoints" if run.is_dir() else "another file" if run.exists() else "nothing"
        raise ExportError(f"{run.name or run}: it must be the folder of a run, got {what}. Name the folder that has its report.")
    wanted = stage or PRETRAINED
    if wanted not in found:
        raise ExportError(
            f"{run.name or run}: the stage must be one that the run has made, {sorted(found)}, got {wanted!r}. Name one "
            "with --stage."
        )
    return found[wanted]


def describe(stored: Stored, encoder: Encoder, eraser: Eraser | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is written beside the exported weights, ready for JSON."""
    data, rows = config["data"], isinstance(encoder, RowEncoder)
    first = next(value for value in encoder.parameters() if value.ndim > 1)
    head = stored.part("head")
    # A stage that a site made alone is saved with the site's name behind a hyphen.
    stage, alone, _ = stored.about["stage"].partition("-")
    return {
        "format": FORMAT,
        "stage": stage,
        "one_site_alone": bool(alone),
        "round": stored.about["round"],
        "config": config,
        "versions": {"isocenter": __version__, "torch": version("torch").partition("+")[0]},
        "trained_with": stored.about["versions"],
        "encoder": config["encoder"],
        "num_inputs": first.shape[1],
        "spatial_dims": None if rows else first.ndim - 2,
        "num_features": encoder.num_features,
        "input": {key: data[key] for key in ("voxel_size_mm", "shape", "normalisation", "stored") if key in data}
        | {"kind": data.get("kind", "images")},
        "erased_directions": {
            "inputs": len(encoder.standardise.directions) if isinstance(encoder, RowEncoder) else 0,
            "h": 0 if eraser is None else len(eraser.directions_KF),
        },
        "objective": config["objective"],
        "rounds": config["num_rounds"],
        "head": ("linear" if "1.weight" in head else "decoder") if head else None,
        "target": config["finetune"].get("target") if "1.weight" in head else None,
        "num_outputs": len(head["1.weight"]) if "1.weight" in head else None,
    }


def example_shape(about: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one input: the run's grid; where the configuration has none, that of MedMNIST."""
    dims = about["spatial_dims"]
    return (about["num_inputs"], *(() if dims is None else about["input"].get("shape") or [28] * dims))


def torchscript(module: nn.Module, shape: tuple[int, ...]) -> bytes:
    """A module traced for batches of any size, as a file that `torch.jit.load` reads without our code.

    torch 2.13 calls TorchScript deprecated; it is what MONAI bundles and programs without Python load, and torch.export's .pt2
    files carry the paths of the machine that wrote them. Those in a TorchScript file are taken out here.

    Args:
        module: in eval mode; its weights lose their gradients.
        shape: of one input.
    """
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(trace|trace_method|save|load)` is deprecated", DeprecationWarning)
        # F.group_norm asks whether there is more than one value to normalise, which is so for every batch.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", module=r"torch\.nn\.functional")
        traced = torch.jit.trace(module, torch.rand(2, *shape, generator=generator), check_trace=False)  # type: ignore[no-untyped-call]
        whole = io.BytesIO()
        torch.jit.save(traced, whole)
        data = _without_sources(whole.getvalue())
        loaded = torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]
        for size in TRIED_BATCHES:
            inputs = torch.rand(size, *shape, generator=generator)
            wanted = module(inputs)
            difference = float((loaded(inputs) - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
            if not difference <= SAME_H:
                raise ExportError(f"export: TorchScript and the module must agree to {SAME_H:g}, they differ by {difference:g}.")
    return data


def _without_sources(archive: bytes) -> bytes:
    """A TorchScript file without the names of the source files that it was traced from, and without the traced inputs."""
    kept = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as whole, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as copy:
        for entry in whole.infolist():
            if not entry.filename.endswith(".debug_pkl") and "/traced_inputs" not in entry.filename:
                copy.writestr(zipfile.ZipInfo(entry.filename), whole.read(entry))
    return kept.getvalue()


def _write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder so that a crash leaves either all of it or nothing by its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
