"""The artifact store: published whole, verified when read, repaired, and never in the way where it can't write."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import msgspec
import pytest

from jagtile.runtime import entries, store
from jagtile.runtime.artifact import ABI_VERSION, Artifact, ArtifactMeta, CompileReport
from jagtile.runtime.errors import CacheError, JagtileWarning
from jagtile.runtime.store import ArtifactStore

KEY = "ab" + 62 * "0"
CONTENT = b"\x7fELF machine code"


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch, tmp_path):
    """What a process remembers is forgotten, and the node's temporary folder is the test's own."""
    monkeypatch.setattr(entries, "_verified", set())
    monkeypatch.setattr(store, "_unwritable", set())
    monkeypatch.setattr(store, "_swept", set())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()


@pytest.fixture
def cache(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "cache")


def meta(**changes: object) -> ArtifactMeta:
    values = {
        "abi": ABI_VERSION,
        "key": "",
        "target": "cpu",
        "spec": "fwd_fp32_d64",
        "config": {"algorithm": "toy", "n": 1},
        "symbol": "kernel",
        "file": "",
        "size": 0,
        "sha256": "",
        "source_sha256": "5",
        "compiler": "g++ 12",
        "launch": {"block_m": 64},
        "report": CompileReport(),
    }
    return ArtifactMeta(**{**values, **changes})


def publish(cache: ArtifactStore, tmp_path: Path, content: bytes = CONTENT, key: str = KEY) -> Artifact:
    binary = tmp_path / "kernel.so"
    binary.write_bytes(content)
    return cache.publish(key, binary, meta())


def entry_of(cache: ArtifactStore) -> Path:
    return cache.root / "store" / KEY[:2] / KEY


def rewrite_meta(entry: Path, **changes: object) -> None:
    path = entry / "meta.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))


def staged(cache: ArtifactStore) -> list[Path]:
    folder = cache.root / "staging"
    return list(folder.iterdir()) if folder.exists() else []


def test_what_is_published_is_found_again_with_its_metadata(cache, tmp_path):
    built = publish(cache, tmp_path)
    assert built.origin == "built"
    found = cache.get(KEY)
    assert found is not None
    assert found.origin == "cache"
    assert found.path.read_bytes() == CONTENT
    assert found.meta == built.meta
    assert (found.meta.key, found.meta.file, found.meta.size) == (KEY, "kernel.so", len(CONTENT))
    assert staged(cache) == []


def test_looking_up_touches_no_disk(cache, tmp_path):
    assert cache.get(KEY) is None
    assert not cache.root.exists()
    assert list((tmp_path / "node").iterdir()) == []


# --- corruption


def truncated(entry: Path) -> None:
    (entry / "kernel.so").write_bytes(CONTENT[:5])


def flipped_byte(entry: Path) -> None:
    (entry / "kernel.so").write_bytes(CONTENT[:-1] + b"?")


def no_binary(entry: Path) -> None:
    (entry / "kernel.so").unlink()


def no_meta(entry: Path) -> None:
    (entry / "meta.json").unlink()


def garbage_meta(entry: Path) -> None:
    (entry / "meta.json").write_bytes(b'{"abi": \xff\xfe')


def half_a_meta(entry: Path) -> None:
    (entry / "meta.json").write_bytes((entry / "meta.json").read_bytes()[:40])


def meta_of_another_schema(entry: Path) -> None:
    (entry / "meta.json").write_bytes(b'{"abi": "one"}')


def foreign_abi(entry: Path) -> None:
    rewrite_meta(entry, abi=ABI_VERSION + 1)


def wrong_key(entry: Path) -> None:
    rewrite_meta(entry, key="cd" + KEY[2:])


def binary_elsewhere(entry: Path) -> None:
    (entry.parent / "other.so").write_bytes(CONTENT)
    rewrite_meta(entry, file="../other.so")


def binary_of_no_name(entry: Path) -> None:
    rewrite_meta(entry, file="")


def a_file_for_a_folder(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_bytes(b"?")


def empty_folder(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


CORRUPTIONS = [
    truncated,
    flipped_byte,
    no_binary,
    no_meta,
    garbage_meta,
    half_a_meta,
    meta_of_another_schema,
    foreign_abi,
    wrong_key,
    binary_elsewhere,
    binary_of_no_name,
    a_file_for_a_folder,
    empty_folder,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_entry_is_set_aside_with_a_warning_that_names_it_and_can_be_built_anew(cache, tmp_path, corrupt):
    publish(cache, tmp_path)
    corrupt(entry_of(cache))
    entries._verified.clear()  # as in a new process
    with pytest.warns(JagtileWarning, match="a cached kernel is corrupt") as warned:
        assert cache.get(KEY) is None
    (aside,) = entry_of(cache).parent.glob(f"{KEY}.bad-*")
    assert str(entry_of(cache)) in str(warned[0].message)
    assert f"set aside as {aside.name}" in str(warned[0].message)
    publish(cache, tmp_path)
    assert cache.get(KEY).path.read_bytes() == CONTENT


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_publishing_over_a_corrupt_entry_replaces_it(cache, tmp_path, corrupt):
    publish(cache, tmp_path)
    corrupt(entry_of(cache))
    entries._verified.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JagtileWarning)  # an empty folder is replaced without a word
        assert publish(cache, tmp_path).origin == "built"
    assert cache.get(KEY).path.read_bytes() == CONTENT


def test_content_is_hashed_once_a_process_and_size_checked_each_time(cache, tmp_path, monkeypatch):
    publish(cache, tmp_path)
    hashed = []
    real = entries.hashlib.sha256
    monkeypatch.setattr(entries.hashlib, "sha256", lambda data: hashed.append(len(data)) or real(data))
    for _ in range(3):
        assert cache.get(KEY) is not None
    assert hashed == [len(CONTENT)]
    truncated(entry_of(cache))
    with pytest.warns(JagtileWarning, match="5 bytes, 17 expected"):
        assert cache.get(KEY) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO])
def test_an_entry_that_can_not_be_read_now_is_a_miss_and_stays_where_it_is(cache, tmp_path, monkeypatch, code):
    publish(cache, tmp_path)

    def fail(self: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert cache.get(KEY) is None
    assert cache.get(KEY) is not None


def test_where_an_entry_stays_unreadable_the_builder_uses_a_copy_of_its_own(cache, tmp_path, monkeypatch):
    publish(cache, tmp_path)
    real = Path.read_bytes

    def fail(self: Path) -> bytes:
        if self.is_relative_to(cache.root):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    own = publish(cache, tmp_path)
    assert own.origin == "built"
    assert not own.path.is_relative_to(cache.root)
    assert cache.get(KEY).path == own.path


def test_an_entry_that_another_process_repaired_in_the_meantime_is_put_back(cache, tmp_path):
    publish(cache, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries._set_aside(entry_of(cache), KEY, "it was corrupt when read")
    assert cache.get(KEY) is not None
    assert list(entry_of(cache).parent.iterdir()) == [entry_of(cache)]


def test_an_entry_that_another_process_set_aside_first_needs_no_word(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries._set_aside(entry_of(cache), KEY, "it was corrupt when read")


# --- races


def test_the_loser_of_a_race_uses_the_winners_entry(cache, tmp_path):
    winner = publish(cache, tmp_path, b"\x7fELF the winner's")
    loser = publish(cache, tmp_path, b"\x7fELF the loser's")
    assert loser.path == winner.path
    assert loser.meta.sha256 == winner.meta.sha256
    assert loser.path.read_bytes() == b"\x7fELF the winner's"
    assert staged(cache) == []


def test_many_publishers_at_once_agree_on_one_entry(cache, tmp_path):
    start = threading.Barrier(8)
    published: list[Artifact] = []

    def race(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        start.wait()
        published.append(publish(cache, folder, f"\x7fELF {number}".encode()))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == 8
    assert len({artifact.meta.sha256 for artifact in published}) == 1
    assert [artifact.origin for artifact in published].count("built") == 1
    assert os.listdir(entry_of(cache).parent) == [KEY]  # noqa: PTH208 - names alone


# --- folders that can't be written


def test_a_cache_that_can_not_be_written_falls_back_to_a_spare_with_one_warning(cache, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")  # as read-only to root too
    with pytest.warns(JagtileWarning, match="can't be written") as warned:
        first = publish(cache, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = publish(ArtifactStore(tmp_path / "cache"), tmp_path, key="cd" + KEY[2:])
    message = str(warned[0].message)
    assert str(tmp_path / "cache") in message
    assert "JAGTILE_CACHE_DIR" in message
    assert first.path.is_relative_to(tmp_path / "node")
    assert second.path.exists()
    assert cache.get(KEY).path == first.path


@pytest.mark.skipif(os.getuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_cache_is_read_and_the_spare_written(cache, tmp_path):
    kept = publish(cache, tmp_path)
    store._swept.clear()
    folders = [cache.root, cache.root / "staging", cache.root / "store"]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert cache.get(KEY).path == kept.path
        with pytest.warns(JagtileWarning, match="can't be written"):
            other = publish(cache, tmp_path, key="cd" + KEY[2:])
        assert other.path.is_relative_to(tmp_path / "node")
    finally:
        for folder in folders:
            folder.chmod(0o700)


def disk_full_below(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "") -> None:
    real = entries.write

    def write(path: Path, content: bytes) -> None:
        if path.is_relative_to(folder) and path.name.startswith(name):
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(entries, "write", write)


@pytest.mark.parametrize("name", ["kernel.so", "meta.json"])
def test_a_full_disk_leaves_nothing_half_published_and_the_kernel_goes_to_the_spare(cache, tmp_path, monkeypatch, name):
    disk_full_below(cache.root, monkeypatch, name)
    with pytest.warns(JagtileWarning, match="No space left on device"):
        artifact = publish(cache, tmp_path)
    assert artifact.path.read_bytes() == CONTENT
    assert artifact.path.is_relative_to(tmp_path / "node")
    assert not entry_of(cache).exists()
    assert staged(cache) == []
    assert cache.get(KEY).path == artifact.path


def test_where_no_disk_has_space_the_error_says_what_helps(cache, tmp_path, monkeypatch):
    disk_full_below(tmp_path, monkeypatch)
    with pytest.warns(JagtileWarning), pytest.raises(CacheError, match=r"No space left.*JAGTILE_CACHE_DIR"):
        publish(cache, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.parent.name == "staging"]


def test_where_neither_cache_nor_temporary_folder_exists_the_error_names_the_cache(cache, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(CacheError, match=rf"{tmp_path}/cache.*JAGTILE_CACHE_DIR"):
        publish(cache, tmp_path)


# --- workspaces and kept failures


def test_a_workspace_is_private_and_gone_afterwards_even_after_an_error(cache):
    folders = []

    def interrupted() -> None:
        with cache.workspace() as first, cache.workspace() as second:
            folders.extend([first, second])
            (first / "deep").mkdir()
            (first / "deep" / "half.o").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first, second = folders
    assert first != second
    assert not first.exists()
    assert not second.exists()


def test_without_a_temporary_folder_the_workspace_is_in_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with cache.workspace() as folder:
        assert folder.is_relative_to(cache.root)


def test_what_killed_builders_left_is_swept_after_a_day_and_younger_work_is_not(cache, tmp_path):
    with cache.workspace() as workspace:
        node_staging = workspace.parent
    day = 24 * 3600
    ages = {"killed-long-ago": day + 60, "at-work": day - 60}
    for staging in (cache.root / "staging", node_staging):
        for name, age in ages.items():
            (staging / name).mkdir(parents=True)
            (staging / name / "half.o").write_text("half")
            os.utime(staging / name, (time.time() - age,) * 2)
    store._swept.clear()
    publish(cache, tmp_path)
    with cache.workspace():
        pass
    for staging in (cache.root / "staging", node_staging):
        assert [folder.name for folder in staging.iterdir()] == ["at-work"]


def test_a_failures_files_are_kept_for_reading_and_swept_after_a_month(cache, tmp_path):
    folder = cache.keep_failure(KEY, {"kernel.cpp": "int x = ü;", "include/a.h": "#pragma once"})
    assert (folder / "kernel.cpp").read_text(encoding="utf-8") == "int x = ü;"
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["a.h", "kernel.cpp"]
    cache.keep_failure(KEY, {"kernel.cpp": "int x;"})
    assert (folder / "kernel.cpp").read_text() == "int x;"
    os.utime(folder, (time.time() - 31 * 24 * 3600,) * 2)
    store._swept.clear()
    publish(cache, tmp_path)
    assert not folder.exists()


def test_a_failure_that_can_not_be_kept_is_no_second_failure(cache, tmp_path, monkeypatch):
    disk_full_below(tmp_path, monkeypatch)
    assert cache.keep_failure(KEY, {"kernel.cpp": "int x;"}) is None
    assert not list(tmp_path.rglob("kernel.cpp*"))


# --- locks


def test_a_lock_is_held_by_one_and_free_again_afterwards(cache):
    with cache.lock(KEY, timeout=0) as first:
        seen: list[bool] = []

        def other() -> None:
            with cache.lock(KEY, timeout=0.05) as second:
                seen.append(second)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (first, seen) == (True, [False])
    with cache.lock(KEY, timeout=0) as again:
        assert again


def test_a_lock_is_of_one_key_in_one_cache(cache, tmp_path):
    held: list[bool] = []

    def others() -> None:
        with cache.lock("cd" + KEY[2:], timeout=0) as other_key:
            held.append(other_key)
        with ArtifactStore(tmp_path / "another").lock(KEY, timeout=0) as other_cache:
            held.append(other_cache)

    with cache.lock(KEY, timeout=0):
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
    assert held == [True, True]


def test_locks_are_local_to_the_node_whatever_the_caches_file_system(cache, tmp_path):
    with cache.lock(KEY):
        locks = list((tmp_path / "node").rglob("*.lock"))
        assert len(locks) == 1
        assert not cache.root.exists()


def test_where_no_lock_can_be_had_nobody_is_waited_for(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with cache.lock(KEY) as go_on:
        assert go_on
    assert "building without a lock" in caplog.text
