"""Files that are written whole or not at all."""

import errno
import os
import re
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the system says that a file cannot take more: the disk, the user's share of it, or what a process may write is full."""
_TEMPORARY = re.compile(r"\..+\.\d+")


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a crash leaves either the old one or the new one; ``mode`` is who may read it, less the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, text: str) -> None:
    """Add a line to a file and have it on the disk; a crash may leave a part of it, which has no line end."""
    with path.open("ab") as file:
        file.write(f"{text}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_atomically` left half written in a folder when its process was killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, so that a power cut does not take back a file that later ones rely on."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
