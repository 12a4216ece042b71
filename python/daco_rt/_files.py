"""Durable, atomic writing of files and folders, and hashing.

Everything is first written beside its target under a hidden name, flushed to the device, and then
renamed. A process that dies at any instruction leaves the old target or the new one, or none where
there was none; what it had begun is swept away by the next write of the same target.

A partial is *stale* when nobody holds its lock: the kernel drops an ``flock`` with the process that took
it, however that ended, whereas process numbers are reused and mean nothing outside their container. They
decide only on file systems without ``flock``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from daco_rt.errors import ArtifactError

CHUNK = 4 << 20
_HASHED_APART = 1 << 20
_WRITE_BACK = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors of the device itself carry no file name, so they are told from errors of the caller by number.
_DEVICE = _FULL | {errno.EFBIG, errno.EIO, errno.EROFS}


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading 4 MiB at a time.

    ``progress`` is called with the number of bytes just read; what it raises ends the hashing.

    Example
    -------
    >>> sha256_file(Path("/dev/null"))[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush one file or one folder's entries to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file under ``folder``, then every folder, the deepest first."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            if not path.is_symlink():
                fsync_path(path)
        fsync_path(Path(root))


class HashingFile:
    """A binary file being written, with the size and SHA-256 of what went in so far.

    Large pieces are hashed on another thread while they are written, and the device is told to begin with
    what it has, so that the flush at the end finds little left to do.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hasher: ThreadPoolExecutor | None = None
        self._begun = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        if len(data) < _HASHED_APART:
            self._file.write(data)
            self._digest.update(data)
        else:
            self._hasher = self._hasher or ThreadPoolExecutor(1, thread_name_prefix="daco-hash")
            hashed = self._hasher.submit(self._digest.update, data)
            try:
                self._file.write(data)
            finally:
                hashed.result()  # the caller may write into its buffer again
        self.bytes += len(data)
        if self.bytes - self._begun >= _WRITE_BACK:
            _begin_write_back(self._file, self._begun, self.bytes - self._begun)
            self._begun = self.bytes

    def close(self) -> None:
        """End the hashing thread; the file itself belongs to the caller."""
        if self._hasher is not None:
            self._hasher.shutdown()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _begin_write_back(file: BinaryIO, start: int, size: int) -> None:
    """Ask the kernel to start writing a range to the device; where it cannot, the flush does it all."""
    file.flush()
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        function(file.fileno(), start, size, _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[HashingFile]:
    """Write ``path`` in one step: the new content appears whole when the block ends without an error.

    Raises
    ------
    ArtifactError
        If the device refuses the data (full, quota, size limit, read-only); the old file is intact.

    Example
    -------
    >>> with atomic_file(Path("notes.txt")) as file:
    ...     file.write(b"two lines\\n")
    """
    path = Path(os.path.realpath(path))
    sweep(path)
    partial = _sibling(path, "partial")
    try:
        with open(partial, "xb") as raw:
            _try_lock(raw.fileno())
            file = HashingFile(raw)
            try:
                yield file
            finally:
                file.close()
            raw.flush()
            os.fsync(raw.fileno())
            os.replace(partial, path)
        fsync_path(path.parent)
    except Exception as error:
        raise _translate(error, path, partial) from error
    finally:
        partial.unlink(missing_ok=True)


def append_file(path: Path, data: bytes) -> None:
    """Append to a file that grows line by line; where the device refuses, nothing of ``data`` stays.

    A kill can leave a part of it at the end, which the file's reader must drop.

    Raises
    ------
    ArtifactError
        If the device refuses the data (full, quota, size limit, read-only).

    Example
    -------
    >>> append_file(Path("metrics.jsonl"), b'{"step": 1}\\n')
    """
    size: int | None = None
    try:
        with open(path, "ab") as file:
            size = os.path.getsize(path)
            file.write(data)
    except OSError as error:
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise _translate(error, path, path) from error


def write_json(path: Path, value: Any) -> HashingFile:
    """Write one JSON document in one step and return its size and hash; NaN and Inf are refused."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return file


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read one JSON object.

    Raises
    ------
    ArtifactError
        If it cannot be read; ``remedy`` says what to do then ("delete it and fill the store again").
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {remedy}") from error
    return value


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an error.

    With ``overwrite`` an existing target is swapped for the new one in one step of the kernel and then
    deleted; otherwise an existing target is refused before anything is written.

    Raises
    ------
    ArtifactError
        If the target exists, or the device refuses the data; the old target is intact.
    """
    target = Path(os.path.realpath(target))
    if not overwrite:
        refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        partial, lock = _locked_folder(target)
    except OSError as error:
        raise _translate(error, target, target.parent) from error
    try:
        yield partial
        fsync_tree(partial)
        _install(partial, target, overwrite)
        fsync_path(target.parent)
    except Exception as error:
        raise _translate(error, target, partial) from error
    finally:
        # After an exchange this folder holds the replaced artifact, after a failure the unfinished one.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def refuse_existing(target: Path) -> None:
    """Raise ``ArtifactError`` if anything, even an empty folder, already has that name."""
    if os.path.lexists(target):
        raise ArtifactError(
            f"{target} already exists; pass --force to replace it, or choose another --output"
        )


def sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it; put back a target they had moved aside."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|aside)-(\d+)-[0-9a-f]+")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        leftover = target.parent / name
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                if not _is_stale(handle, int(match[2])):
                    continue
                if match[1] == "aside" and not os.path.lexists(target):
                    os.rename(leftover, target)
                else:
                    _remove(leftover)
            finally:
                os.close(handle)


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _try_lock(handle: int) -> None:
    # A file system without flock still gets its writer; staleness then falls back on the process number.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Create and lock a partial folder, again if another writer's sweep took it between the two steps."""
    while True:
        partial = _sibling(target, "partial")
        os.mkdir(partial)
        try:
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            return partial, handle
        if os.path.isdir(partial):
            return partial, handle
        os.close(handle)


def _is_stale(handle: int, pid: int) -> bool:
    """Whether the writer is gone; if so, this process now holds its lock, until ``handle`` is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not _alive(pid)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """``renameat2``; False where the C library, the kernel or the file system does not have it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _install(partial: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; afterwards ``partial`` is gone or holds the old target."""
    if overwrite and os.path.lexists(target):
        if not _renameat2(partial, target, _EXCHANGE):
            _replace_in_two_steps(partial, target)
        return
    try:
        if not _renameat2(partial, target, _NOREPLACE):
            refuse_existing(target)
            os.rename(partial, target)
    except FileExistsError:
        refuse_existing(target)
        raise


def _replace_in_two_steps(partial: Path, target: Path) -> None:
    """Move the old target aside and the new one in; killed in between, ``sweep`` puts the old one back."""
    aside = _sibling(target, "aside")
    lock = os.open(target, os.O_RDONLY)
    try:
        _try_lock(lock)
        os.rename(target, aside)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def _translate(error: Exception, target: Path, partial: Path) -> Exception:
    """Turn a failure of the device into one sentence; leave every other error as it is."""
    # Writers in other languages report a full disk as text in exceptions of their own.
    told = "No space left on device" in str(error)
    code = errno.ENOSPC if told else getattr(error, "errno", None)
    if not told:
        if not isinstance(error, OSError) or isinstance(error, ArtifactError):
            return error
        named = str(error.filename) if error.filename is not None else None
        ours = named is not None and named.startswith((str(partial), str(target)))
        if code not in _DEVICE and not ours:
            return error
    if code in _FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(target.parent).free
            return ArtifactError(
                f"cannot write {target}: the disk is full ({free:,} bytes free); nothing was replaced: "
                "free some space or choose another --output"
            )
    reason = os.strerror(code) if code is not None else str(error)
    return ArtifactError(
        f"cannot write {target}: {reason.lower()}; nothing was replaced: check the limits and permissions "
        "of that place or choose another --output"
    )
