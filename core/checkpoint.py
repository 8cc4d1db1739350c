"""Checkpoints: safetensors with the configuration, round and versions beside the weights; written atomically; never pickle."""

import json
import re
import secrets
from collections.abc import Callable, Mapping
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

_NAMED = re.compile(r"(.+)-(\d{4,})\.safetensors")


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


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int | None, taken: bool = False) -> Path:
    """Write ``<stage>-<round>.safetensors`` and drop all but the last ``keep`` of that stage; the same bytes for the same run.

    With ``keep`` None nothing is dropped yet. With ``taken`` it is the round that the stage comes to, and those of every other
    round are dropped.
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
    if taken:
        drop_rounds(folder, checkpoint.stage, lambda number: number == checkpoint.round_number)
    elif keep is not None:
        keep_last(folder, checkpoint.stage, keep)
    return path


def rounds_of(folder: Path) -> dict[tuple[str, int], Path]:
    """The files ``<stage>-<round>.safetensors`` of a folder by stage and round, in the order of the rounds."""
    named = ((path, _NAMED.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ()))
    found = {(match[1], int(match[2])): path for path, match in named if match}
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def drop_rounds(folder: Path, stage: str, stays: Callable[[int], bool]) -> None:
    """Remove a stage's files of all rounds but those that stay."""
    for (of, number), path in rounds_of(folder).items():
        if of == stage and not stays(number):
            path.unlink()


def keep_last(folder: Path, stage: str, keep: int) -> None:
    """Remove a stage's files of all rounds but the last ``keep``."""
    last = [number for of, number in rounds_of(folder) if of == stage][-keep:]
    drop_rounds(folder, stage, lambda number: number in last)


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
