"""Atomic writing, for real: killed processes, refused data, swapped folders."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from daco_rt import _files
from daco_rt._files import atomic_directory, atomic_file, sha256_file, sweep
from daco_rt.errors import ArtifactError


def run(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def write_tree(target: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite=overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "inner" / "b.txt").write_text(text * 2)


def read_tree(target: Path) -> tuple[str, str]:
    return (target / "a.txt").read_text(), (target / "inner" / "b.txt").read_text()


@pytest.fixture(params=["exchange", "two steps"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two steps":
        monkeypatch.setattr(_files, "_renameat2", lambda *_: False)
    return request.param


def test_directory_appears_whole_and_is_replaced(tmp_path: Path, rename: str) -> None:
    target = tmp_path / "new" / "parents" / "out"
    write_tree(target, "one")
    assert read_tree(target) == ("one", "oneone")
    write_tree(target, "two", overwrite=True)
    assert read_tree(target) == ("two", "twotwo")
    assert os.listdir(target.parent) == ["out"]


def test_overwrite_of_nothing(tmp_path: Path, rename: str) -> None:
    write_tree(tmp_path / "out", "one", overwrite=True)
    assert read_tree(tmp_path / "out") == ("one", "oneone")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_existing_target_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("x")
    else:
        target.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
    words = "already exists; pass --force to replace it, or choose another --output"
    with pytest.raises(ArtifactError, match=words), atomic_directory(target):
        pytest.fail("the block ran")
    assert hidden(tmp_path) == []


def test_target_that_appears_meanwhile_is_not_touched(tmp_path: Path, rename: str) -> None:
    target = tmp_path / "out"
    with pytest.raises(ArtifactError, match="already exists"), atomic_directory(target) as folder:
        (folder / "a").write_text("mine")
        target.mkdir()
        (target / "b").write_text("theirs")
    assert os.listdir(target) == ["b"]
    assert hidden(tmp_path) == []


def test_old_target_survives_an_error_in_the_block(tmp_path: Path, rename: str) -> None:
    target = tmp_path / "out"
    write_tree(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True) as folder:
        (folder / "a.txt").write_text("new")
        raise ZeroDivisionError
    assert read_tree(target) == ("old", "oldold")
    assert hidden(tmp_path) == []


def test_old_target_is_restored_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write_tree(target, "old")
    monkeypatch.setattr(_files, "_renameat2", lambda *_: False)
    real = os.rename

    def rename(source: os.PathLike[str], goal: os.PathLike[str]) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, goal)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ArtifactError, match="input/output error"):
        write_tree(target, "new", overwrite=True)
    assert read_tree(target) == ("old", "oldold")
    assert hidden(tmp_path) == []


def test_old_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from daco_rt import _files
        _files._renameat2 = lambda *_: False
        real = os.rename
        def rename(source, goal):
            if ".partial-" in str(source):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, goal)
        os.rename = rename
        with _files.atomic_directory(Path(sys.argv[1]), overwrite=True) as folder:
            (folder / "a.txt").write_text("new")
    """
    target = tmp_path / "out"
    write_tree(target, "old")
    assert run(code, target).returncode == -signal.SIGKILL
    assert not target.exists() and len(hidden(tmp_path)) == 2
    sweep(target)
    assert read_tree(target) == ("old", "oldold")
    assert hidden(tmp_path) == []


KILLED = """
    import os, sys, threading, time
    from pathlib import Path
    from daco_rt._files import atomic_directory
    with atomic_directory(Path(sys.argv[1]), overwrite=True) as folder:
        with open(folder / "big", "wb") as file:
            print("writing", flush=True)
            while True:
                file.write(os.urandom(1 << 16))
"""


@pytest.mark.parametrize("existing", [False, True])
def test_sigkill_in_the_middle_of_a_write(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "out"
    if existing:
        write_tree(target, "old")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), target], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        while not any((tmp_path / name / "big").stat().st_size for name in hidden(tmp_path)):
            pass
        sweep(target)
        assert len(hidden(tmp_path)) == 1, "a living writer was swept"
        process.kill()
    assert target.exists() == existing
    if existing:
        assert read_tree(target) == ("old", "oldold")
    assert len(hidden(tmp_path)) == 1
    write_tree(target, "new", overwrite=existing)
    assert read_tree(target) == ("new", "newnew")
    assert hidden(tmp_path) == []


def test_sigkill_at_every_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """The writer kills itself before its n-th call into the file system, for every n until it survives."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from daco_rt import _files
        count, limit = 0, int(sys.argv[2])
        def killing(function):
            def call(*args, **kwargs):
                global count
                if count == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*args, **kwargs)
            return call
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "open"):
            setattr(os, name, killing(getattr(os, name)))
        _files._renameat2 = killing(_files._renameat2)
        _files.shutil.rmtree = killing(_files.shutil.rmtree)
        with _files.atomic_directory(Path(sys.argv[1]), overwrite=True) as folder:
            os.mkdir(folder / "inner")
            (folder / "a.txt").write_text("new")
            (folder / "inner" / "b.txt").write_text("newnew")
    """
    outcomes = set()
    for limit in range(60):
        target = tmp_path / str(limit) / "out"
        write_tree(target, "old")
        done = run(code, target, limit)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        outcomes.add(read_tree(target))
        assert read_tree(target) in {("old", "oldold"), ("new", "newnew")}
        sweep(target)
        assert hidden(target.parent) == []
        if done.returncode == 0:
            break
    else:
        pytest.fail("the writer never survived")
    assert len(outcomes) == 2 and limit > 8


@pytest.mark.parametrize("existing", [False, True])
def test_size_limit_gives_one_sentence_and_keeps_the_old(tmp_path: Path, existing: bool) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from daco_rt._files import atomic_directory
        from daco_rt.errors import ArtifactError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            with atomic_directory(Path(sys.argv[1]), overwrite=True) as folder:
                (folder / "big").write_bytes(bytes(2 << 20))
        except ArtifactError as error:
            print(error)
    """
    target = tmp_path / "out"
    if existing:
        write_tree(target, "old")
    done = run(code, target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert str(target) in done.stdout and "file too large" in done.stdout
    assert target.exists() == existing
    if existing:
        assert read_tree(target) == ("old", "oldold")
    assert hidden(tmp_path) == []


def test_full_disk_gives_one_sentence_and_keeps_the_old(tmp_path: Path) -> None:
    """A real full disk: a small tmpfs in a mount namespace of its own."""
    code = """
        import os, sys
        from pathlib import Path
        from daco_rt._files import atomic_directory
        from daco_rt.errors import ArtifactError
        target = Path(sys.argv[1], "out")
        with atomic_directory(target) as folder:
            (folder / "small").write_text("old")
        try:
            with atomic_directory(target, overwrite=True) as folder:
                (folder / "big").write_bytes(bytes(4 << 20))
        except ArtifactError as error:
            print(error)
        print(os.listdir(sys.argv[1]), (target / "small").read_text())
    """
    script = tmp_path / "code.py"
    script.write_text(textwrap.dedent(code))
    mount = tmp_path / "disk"
    mount.mkdir()
    shell = f"mount -t tmpfs -o size=1m none {mount} && {sys.executable} {script} {mount} || exit 77"
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "mount:" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    sentence, state = done.stdout.splitlines()
    assert "the disk is full" in sentence and "choose another --output" in sentence
    assert state == "['out'] old"


def test_full_disk_told_by_another_language(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the disk is full"), atomic_directory(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert os.listdir(tmp_path) == []


def test_errors_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out"):
        os.stat("/nonexistent/source")
    assert os.listdir(tmp_path) == []


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_tree(tmp_path / "file" / "out", "x")


def test_symlinked_target_replaces_what_it_points_at(tmp_path: Path) -> None:
    write_tree(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write_tree(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read_tree(tmp_path / "real") == ("new", "newnew")


def test_atomic_file_writes_hashes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "f"
    for data in (b"one", b"two" * 100_000):
        with atomic_file(target) as file:
            file.write(data)
        assert target.read_bytes() == data
        assert file.sha256 == hashlib.sha256(data).hexdigest() == sha256_file(target)
        assert file.bytes == len(data)
    with pytest.raises(ZeroDivisionError), atomic_file(target) as file:
        file.write(b"three")
        raise ZeroDivisionError
    assert target.read_bytes() == b"two" * 100_000
    assert os.listdir(tmp_path) == ["f"]


def test_sha256_reports_progress(tmp_path: Path) -> None:
    data = os.urandom(_files.CHUNK + 5)
    (tmp_path / "f").write_bytes(data)
    steps: list[int] = []
    assert sha256_file(tmp_path / "f", steps.append) == hashlib.sha256(data).hexdigest()
    assert steps == [_files.CHUNK, 5]


def test_leftovers_of_other_targets_are_not_swept(tmp_path: Path) -> None:
    for name in (".out2.partial-1-ab", ".out.partial-x-ab", ".other"):
        (tmp_path / name).mkdir()
    write_tree(tmp_path / "out", "x")
    assert len(hidden(tmp_path)) == 3
