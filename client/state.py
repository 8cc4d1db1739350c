"""The folder in which a site keeps what it needs between tasks and what nobody else may see."""

import os
from collections.abc import Mapping
from pathlib import Path

from core.faults import SiteError

STATUS = "status.json"
"""Where the worker tells what it does."""


def state_folder(node_config: Mapping[str, object]) -> Path | None:
    """``state-root``, or ``state`` beside the site's policy; None for a site that tells neither.

    Raises:
        SiteError: it is no absolute path.
    """
    told = node_config.get("state-root")
    folder = Path(str(told)) if told is not None else None
    if folder is None and "site-file" in node_config:
        folder = Path(str(node_config["site-file"])).parent / "state"
    if folder is not None and not folder.is_absolute():
        raise SiteError("node_config", "state-root and site-file must be absolute paths.")
    return folder


def private_folder(folder: Path) -> Path:
    """The folder, made so that only its owner may enter it.

    Raises:
        SiteError: it is someone else's, or others may enter it.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise SiteError("state", "the site's state folder must be its user's alone (mode 700), it is open to others; mend that.")
    return folder
