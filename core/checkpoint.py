"""Checkpoints: safetensors with the configuration, round and versions beside the weights; written atomically; never pickle."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from core import __version__
from core.files import write_atomically as write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """A model at the end of a round.

    Attributes:
        state: weights by name.
        stage: ``pretrain`` or a stage of fine-tuning.
        round_number: rounds done; 0 is the model before training.
        config: the run's configuration, without folders.
    """

    state: dict[str, Tensor]
    stage: str
    round_number: int
    config: dict[str, Any]


def pseudonym_key(folder: Path) -> bytes:
    """The secret that a folder's pseudonyms are made with: drawn once, kept in ``pseudonyms.key``, for its owner's eyes alone."""
    path = folder / "pseudonyms.key"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(32).encode(), 0o600)
    return bytes.fromhex(path.read_text(encoding="ascii"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, taken: bool = False) -> Path:
    """Write ``<stage>-<round>.safetensors`` and drop all but the last ``keep`` of that stage; the same bytes for the same run.

    With ``taken`` it is the round that the stage comes to, and those of every other round are dropped.
    """
    about = {
        "format": 1,
        "stage": checkpoint.stage,
        "round": checkpoint.round_number,
        "config": checkpoint.config,
        "versions": {"isocenter": __version__, "torch": version("torch").partition("+")[0]},
    }
    # One entry: safetensors writes several in an order of its own, different in every process.
    metadata = {"isocenter": json.dumps(about, sort_keys=True)}
    path = folder / f"{checkpoint.stage}-{checkpoint.round_number:04d}.safetensors"
    write_atomically(path, save({name: value.contiguous() for name, value in checkpoint.state.items()}, metadata))
    pattern = re.compile(rf"{re.escape(checkpoint.stage)}-\d{{4,}}\.safetensors")
    kept = [p for p in sorted(folder.iterdir()) if pattern.fullmatch(p.name)]
    for old in [p for p in kept if p != path] if taken else kept[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        ValueError: the file is no checkpoint of Isocenter.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "isocenter" not in metadata:
            raise ValueError(f"checkpoint: {path.name} must be one of Isocenter's, got the metadata {sorted(metadata)}.")
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["isocenter"])
    return Checkpoint(state, about["stage"], about["round"], about["config"])


def last_checkpoints(run: Path) -> dict[str, Path]:
    """The last checkpoint of each stage in a run's folder; none where it holds none."""
    found: dict[str, Path] = {}
    for file in (run / "checkpoints").glob("*.safetensors"):
        stage, _, number = file.stem.rpartition("-")
        if number.isdecimal() and (stage not in found or int(number) > int(found[stage].stem.rpartition("-")[2])):
            found[stage] = file
    return found


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load every weight or stop: a name missing or left over is an error."""
    model.load_state_dict(dict(state), strict=True)
