"""Which code may run at a site: bundles whose very bytes its IT has looked at and kept.

A bundle is Flower's, a zip file. What it is called, or says of itself, counts for nothing: its content is compared.
"""

import difflib
import hashlib
import io
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

MAX_BUNDLE = 10 * 1024 * 1024
"""Bytes of a bundle; Flower makes no larger ones."""
MAX_UNPACKED = 50 * 1024 * 1024
MAX_FILES = 2000
MAX_PENDING = 20
MAX_SHOWN = 200_000
"""Bytes of a file that is shown in a difference; a larger one is named."""
PACKAGES = ("core", "client", "server", "configs")
SUFFIXES = (".py", ".yaml")


class ApprovalError(ValueError):
    """A bundle that cannot be kept, or none of that name; one line for the site's IT."""


def digest(content: bytes) -> str:
    """SHA-256 of a bundle, as Flower names it.

    >>> digest(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


class Approvals:
    """The bundles a site has seen, in ``approved/``, ``pending/`` and ``revoked/`` of a folder, each named by its hash.

    The code of those that ran is in ``apps/``.

    Args:
        folder: the site's ``state``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, place: str, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            raise ApprovalError(f"bundle: its name must be a SHA-256 of 64 hexadecimal digits, got {name!r}.")
        return self.folder / place / f"{name}.fab"

    def approves(self, content: bytes) -> bool:
        """Whether these very bytes are among the approved ones."""
        try:
            return self._path("approved", digest(content)).read_bytes() == content
        except FileNotFoundError:
            return False

    def keep_pending(self, content: bytes) -> str:
        """Keep a bundle to be looked at; its hash.

        Raises:
            ApprovalError: it is too large or no sane zip file, or too many are waiting.
        """
        files_in(content)
        name = digest(content)
        path = self._path("pending", name)
        if not path.exists():
            if len(self.pending()) >= MAX_PENDING:
                raise ApprovalError(
                    f"bundle: at most {MAX_PENDING} may wait to be looked at, got one more. Approve or remove some."
                )
            _write(path, content)
        return name

    def pending(self) -> list[str]:
        """Hashes of the bundles that wait, the newest last."""
        return self._names("pending")

    def approved(self) -> list[str]:
        """Hashes of the approved bundles, the last approved one last."""
        return self._names("approved")

    def _names(self, place: str) -> list[str]:
        files = [path for path in (self.folder / place).glob("*.fab") if re.fullmatch("[0-9a-f]{64}", path.stem)]
        return [path.stem for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.stem))]

    def content(self, name: str, place: str = "pending") -> bytes:
        """The bytes of a kept bundle.

        Raises:
            ApprovalError: there is none, or its content is not what its name says.
        """
        try:
            content = self._path(place, name).read_bytes()
        except FileNotFoundError:
            raise ApprovalError(f"bundle {name[:12]}: it must be {place}, there is none of that name.") from None
        if digest(content) != name:
            raise ApprovalError(f"bundle {name[:12]}: its content must be what its name says, it was changed. Remove the file.")
        return content

    def approve(self, name: str) -> None:
        """Let a pending bundle run from now on.

        Raises:
            ApprovalError: there is none, or its content is not what its name says.
        """
        content = self.content(name)
        _write(self._path("approved", name), content)
        self._path("pending", name).unlink()

    def unpacked(self, content: bytes) -> Path:
        """The folder in ``apps/`` with the files of an approved bundle.

        Raises:
            ApprovalError: it is too large, or no sane zip file.
            OSError: the disk does not take it.
        """
        folder = self.folder / "apps" / digest(content)
        if not folder.exists():
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            for name, data in files_in(content).items():
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.write_bytes(data)
            new.rename(folder)
        return folder

    def revoke(self, name: str) -> None:
        """Let an approved bundle run no more; it is kept in ``revoked/``.

        Raises:
            ApprovalError: there is none.
        """
        kept, gone = self._path("approved", name), self._path("revoked", name)
        gone.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            kept.replace(gone)
            shutil.rmtree(self.folder / "apps" / name, ignore_errors=True)
        except FileNotFoundError:
            raise ApprovalError(f"bundle {name[:12]}: it must be approved, there is none of that name.") from None

    def difference(self, pending: bytes, base: bytes | None = None) -> str:
        """What a bundle would change: a summary, then a unified diff of each file.

        Args:
            pending: the bundle.
            base: another; None: the last approved one, or, without any, what is installed on this machine.
        """
        if base is None and (approved := self.approved()):
            base = self.content(approved[-1], "approved")
            told = f"the approved bundle {approved[-1][:12]}"
        else:
            told = "what is installed on this machine" if base is None else f"the bundle {digest(base)[:12]}"
        before = installed_files() if base is None else files_in(base)
        return difference(before, files_in(pending), told)


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole, for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def files_in(content: bytes) -> dict[str, bytes]:
    """The files of a bundle by name, unpacked in memory once it is known to be sane.

    Raises:
        ApprovalError: too large, no zip file, or one with names or entries that a bundle has no need of.
    """
    if len(content) > MAX_BUNDLE:
        raise ApprovalError(f"bundle: it must have at most {MAX_BUNDLE} bytes, got {len(content)}.")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_FILES or sum(info.file_size for info in infos) > MAX_UNPACKED:
                raise ApprovalError(f"bundle: it must unpack to at most {MAX_FILES} files and {MAX_UNPACKED} bytes, got more.")
            for info in infos:
                _check_entry(info)
            names = [PurePosixPath(info.filename).as_posix() for info in infos]
            if len({name.casefold() for name in names}) < len(names):
                raise ApprovalError("bundle: its names must differ, got one twice, or two that some file systems hold for one.")
            return {name: _unpacked(archive, info) for name, info in zip(names, infos, strict=True) if not info.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, ApprovalError):
            raise
        raise ApprovalError(f"bundle: it must be a zip file that can be read, got {shown(str(error))}") from None


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """One file, no larger than it was said to be."""
    with archive.open(info) as file:
        content = file.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise ApprovalError(f"bundle: {shown(info.filename)} must be as large as it is said to be, it is not.")
    return content


def _check_entry(info: zipfile.ZipInfo) -> None:
    """Refuse what would be written outside the bundle's folder, or is no plain file."""
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    parts = name.rstrip("/").split("/")
    if name.startswith("/") or "\\" in name or ":" in name or "\0" in name or not all(parts) or {".", ".."} & set(parts):
        raise ApprovalError(f"bundle: names must stay inside it, got {shown(name)!r}.")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
        raise ApprovalError(f"bundle: {shown(name)} must be a plain file, got a link, a device or an encrypted one.")


def installed_files() -> dict[str, bytes]:
    """What of the packages a bundle holds is importable on this machine, by the names it has in a bundle."""
    found: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for root in map(Path, (spec.submodule_search_locations or ()) if spec else ()):
            for path in sorted(root.rglob("*")):
                if path.suffix in SUFFIXES and path.is_file():
                    found.setdefault(f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes())
    return found


def shown(text: str) -> str:
    r"""Text that a terminal shows as it is: what would move the cursor or turn the direction of writing is written out.

    >>> print(shown("a\x1b[2Jb\u202e"))
    a\x1b[2Jb\u202e
    """
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def difference(before: Mapping[str, bytes], after: Mapping[str, bytes], base: str) -> str:
    r"""What changed between two sets of files, a summary first; files that are gone, binary or large are named only.

    >>> print(difference({"a.py": b"x = 1\n"}, {"a.py": b"x = 2\n", "b.py": b""}, "before"))
    against before: 0 files same, 1 changed, 1 added, 0 removed
    <BLANKLINE>
    changed a.py
    --- a.py
    +++ a.py
    @@ -1 +1 @@
    -x = 1
    +x = 2
    added b.py
    """
    same = [name for name in after if before.get(name) == after[name]]
    kinds = {
        "changed": sorted(name for name in after if name in before and name not in same),
        "added": sorted(set(after) - set(before)),
        "removed": sorted(set(before) - set(after)),
    }
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    lines = [f"against {base}: {len(same)} files same, {counts}", ""]
    for kind, names in kinds.items():
        for name in names:
            old, new = before.get(name, b""), after.get(name, b"")
            if kind == "removed":
                lines.append(f"removed {shown(name)} ({len(old)} bytes)")
                continue
            old_lines, new_lines = _text(old), _text(new)
            if old_lines is None or new_lines is None:
                lines.append(f"{kind} {shown(name)}: not shown, it is binary or large ({len(old)} bytes before, {len(new)} now)")
                continue
            lines.append(f"{kind} {shown(name)}")
            lines += map(shown, difflib.unified_diff(old_lines, new_lines, shown(name), shown(name), lineterm=""))
            if old and old_lines == new_lines:
                lines.append("(the same but for the ends of lines)")
    return "\n".join(lines)


def _text(content: bytes) -> list[str] | None:
    """The lines of a text, None for what is binary or large."""
    if len(content) > MAX_SHOWN or b"\0" in content:
        return None
    try:
        return content.decode().split("\n")[: None if content and not content.endswith(b"\n") else -1]
    except UnicodeDecodeError:
        return None
