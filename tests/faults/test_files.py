"""Files written whole or not at all: faults of every call, full and read-only disks, readers."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import moe_ops
from moe_ops import _files, zoo
from moe_ops._state import read_state, write_state

from .failing_files import failing, leftovers

NUMBERS = (errno.ENOSPC, errno.EIO, errno.EROFS)


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    root = str(Path(moe_ops.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*options.pop("prefix", []), sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


# --- one file


def test_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    _files.write_text(path, "one")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    before = path.stat().st_ino
    _files.write_file(path, b"t", bytearray(b"w"), memoryview(b"o"))
    assert path.read_text() == "two" and path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/a")
    for text in ("one", "two"):
        _files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "a").read_text() == text


def test_pipes_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    _files.write_text(pipe, "said")
    assert os.read(reader, 10) == b"said" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_sentences(tmp_path):
    (tmp_path / "a").write_text("")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "b", "No such file or directory"),
        (tmp_path / "a" / "b", "Not a directory"),
        (Path("/dev/full"), "No space left on device"),
    ):
        with pytest.raises(_files.WriteError) as caught:
            _files.write_text(path, "text")
        assert str(caught.value).endswith(f"cannot be written: {reason}"), caught.value
        assert caught.value.errno
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(_files.WriteError, match="it must be a folder, got a file"):
            _files.make_folder(path)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    """And those of writers at work are not."""
    code = (
        "import os, signal, sys\n"
        "from moe_ops import _files\n"
        "_files.Replacement(sys.argv[1]).add('b', bytes(1000))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_python(code, tmp_path).returncode == -9
    (left,) = leftovers(tmp_path)
    with _files.Replacement(tmp_path) as at_work:
        at_work.add("a", b"one")
        assert left not in leftovers(tmp_path)
        _files.write_text(tmp_path / "c", "two")
        assert len(leftovers(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_several_files_change_together(tmp_path):
    for name in ("a", "b", "old"):
        (tmp_path / name).write_text(f"old {name}")
    seen = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        present = {p.name: p.read_text() for p in tmp_path.iterdir() if not p.name.startswith(".")}
        seen.append(present)

    with _files.Replacement(tmp_path, last="a") as files:
        files.add("a", b"new a")
        files.add("b", b"new b")
        files.add("c", b"new c")
        files.remove("o*", "none")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", watched)
            files.commit()
    assert seen[-1] == {"a": "new a", "b": "new b", "c": "new c"}
    for present in seen[:-1]:
        assert "a" not in present  # Killed here, a reader finds it incomplete.


def test_flushed_before_it_has_its_name(tmp_path):
    with failing(-1, 0) as faults:
        _files.write_text(tmp_path / "a", "text")
    assert faults.calls == ["open", "open", "write", "fsync", "open", "replace", "fsync"]


def test_writes_that_write_a_part(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:3]))
    _files.write_file(tmp_path / "a", b"0123456789", b"", b"ab")
    assert (tmp_path / "a").read_bytes() == b"0123456789ab"


def test_names_change_for_one_writer_at_a_time(tmp_path):
    thread = threading.Thread(target=_files.write_text, args=(tmp_path / "a", "text"))
    with _files._locked(tmp_path):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and os.listdir(tmp_path) == []
    thread.join()
    assert os.listdir(tmp_path) == ["a"]


# --- every call of every writer fails in turn


def tensors(value: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((50, 7), float(value)), "b": torch.full((5,), value)}


class StateWriter:
    def save(self, folder: Path, value: int) -> None:
        _files.make_folder(folder / "deeper")
        write_state(folder / "deeper" / "state.pt", {**tensors(value), "value": value})

    def load(self, folder: Path) -> int:
        found = read_state(folder / "deeper" / "state.pt")
        for name, tensor in tensors(found["value"]).items():
            assert torch.equal(found[name], tensor)
        return found["value"]


def tiny_model(num_layers: int) -> Any:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
    return zoo.create_model("topp", num_layers=num_layers, num_experts=2, **sizes)


class ZooWriter:
    """Two kinds of model in turn, whose configs, shapes and numbers of files differ."""

    def save(self, folder: Path, value: int) -> None:
        model = tiny_model(1 + value % 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(folder, max_shard_bytes=2000 if value % 2 else 10**9)

    def load(self, folder: Path) -> int:
        found = zoo.get("topp").load().TopP.from_pretrained(folder).state_dict()
        value = int(found["norm.weight"][0])
        assert all(bool((tensor == value).all()) for tensor in found.values())
        assert any(name.startswith("layers.1") for name in found) == bool(value % 2)
        return value


class TextWriter:
    def save(self, folder: Path, value: int) -> None:
        _files.write_json(folder / "a.json", {"value": value})

    def load(self, folder: Path) -> int:
        return json.loads((folder / "a.json").read_text())["value"]


@pytest.mark.parametrize(
    ("writer", "number"),
    [
        *((StateWriter(), number) for number in NUMBERS),
        *((TextWriter(), number) for number in NUMBERS),
        (ZooWriter(), errno.ENOSPC),
    ],
    ids=lambda it: errno.errorcode[it] if isinstance(it, int) else type(it).__name__,
)
def test_every_failed_call_leaves_old_or_new(writer, number, tmp_path):
    """Old or new, whole; no leftovers; the next save works."""
    kinds = set()
    for at in range(1000):
        folder = tmp_path / str(at)
        folder.mkdir()
        writer.save(folder, 0)
        raised = None
        with failing(at, number) as faults:
            try:
                writer.save(folder, 1)
            except OSError as error:
                raised = error
        if faults.failed is None:
            assert raised is None and writer.load(folder) == 1
            break
        kinds.add(faults.failed)
        if raised is None:
            # Links and modes are not everywhere, a folder that is there need not be made.
            assert writer.load(folder) == 1
        else:
            assert isinstance(raised, _files.WriteError) and raised.errno == number
            assert str(raised).endswith(f" cannot be written: {os.strerror(number)}")
            # The last call flushes the folder; the new file has its name already.
            assert writer.load(folder) in ((0, 1) if faults.failed == "fsync" else (0,))
        assert leftovers(folder) == [], (at, faults.calls)
        writer.save(folder, 2)
        assert writer.load(folder) == 2
    assert kinds >= {"open", "write", "fsync", "replace"}


def test_first_save_that_fails_leaves_nothing(tmp_path):
    for at in range(100):
        folder = tmp_path / str(at)
        raised = False
        with failing(at, errno.ENOSPC) as faults:
            try:
                tiny_model(1).save_pretrained(folder)
            except _files.WriteError:
                raised = True
        if faults.failed is None:
            break
        assert leftovers(tmp_path) == []
        if not raised or faults.failed == "fsync":
            continue
        with pytest.raises(FileNotFoundError):
            zoo.get("topp").load().TopP.from_pretrained(folder)


# --- readers and writers at the same time


def test_readers_keep_what_they_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny = [tiny_model(1) for _ in range(3)]
    tiny[0].save_pretrained(tmp_path)
    whole = path.read_bytes()
    with (
        safe_open(path, framework="pt") as opened,
        open(path, "rb") as slow,
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        read = slow.read(100)
        for model in tiny[1:]:
            model.save_pretrained(tmp_path)
        name = "model.embed_tokens.weight"
        assert torch.equal(opened.get_tensor(name), tiny[0].embed_tokens.weight)
        assert read + slow.read() == whole and mapped[:] == whole
    assert path.read_bytes() != whole


def test_two_writers_and_a_reader(tmp_path):
    """Whatever the order, each load finds one of the writers' checkpoints, whole."""
    StateWriter().save(tmp_path, 0)
    errors: list[BaseException] = []
    ended = threading.Event()

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def write(start: int) -> Callable[[], None]:
        def work() -> None:
            for step in range(start, start + 40):
                StateWriter().save(tmp_path, step)

        return work

    def read() -> None:
        while not ended.is_set():
            StateWriter().load(tmp_path)

    writers = [guarded(write(100)), guarded(write(200))]
    reader = guarded(read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert errors == []
    assert StateWriter().load(tmp_path) in (139, 239)
    assert leftovers(tmp_path) == []


def test_two_writers_of_several_files(tmp_path):
    """Models of other shapes and numbers of files: what remains is of one of them."""
    errors: list[BaseException] = []

    def write(value: int) -> None:
        try:
            for _ in range(10):
                ZooWriter().save(tmp_path, value)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(FileNotFoundError, ValueError):
            assert ZooWriter().load(tmp_path) in (1, 2)
    assert errors == []
    assert ZooWriter().load(tmp_path) in (1, 2)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.full)])
def test_killed_training_loses_no_step(tmp_path, seed, kills):
    script = (Path(__file__).parents[1] / "demo" / "kill_training.py").read_text()
    result = run_python(script, tmp_path, kills, seed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{kills} kills"), result.stdout
    print(result.stdout)


# --- disks


def namespace_or_skip() -> list[str]:
    """A prefix for a command that may mount file systems of its own."""
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    pytest.skip("this system lets nobody mount file systems in a namespace of their own")


SAVES = """
import subprocess, sys
from moe_ops._files import WriteError
from moe_ops._state import read_state, write_state
import torch
folder, mount = sys.argv[1], sys.argv[2:]
subprocess.run(mount, check=True)
path = folder + "/state.pt"
for size in (1000, 2000, 1_000_000, 3000):
    try:
        write_state(path, {"a": torch.zeros(size), "step": size})
    except WriteError as error:
        print(error)
    print(read_state(path)["step"])
subprocess.run(["ls", "-A", folder], check=True)
"""


def test_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    result = run_python(SAVES, tmp_path, *mount, prefix=namespace_or_skip())
    path = tmp_path / "state.pt"
    assert result.stdout.split("\n") == [
        "1000", "2000", f"{path} cannot be written: No space left on device", "2000", "3000",
        "state.pt", "",
    ], result.stdout + result.stderr  # fmt: skip


def test_limit_of_file_sizes(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run_python(SAVES, tmp_path, "true", preexec_fn=limit)
    path = tmp_path / "state.pt"
    assert result.stdout.split("\n")[2:5] == [
        f"{path} cannot be written: File too large", "2000", "3000",
    ], result.stdout + result.stderr  # fmt: skip


READ_ONLY = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", sys.argv[1]], check=True)
from moe_ops.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("deeper", ["", "a"])
def test_read_only_folder(tmp_path, deeper):
    out = tmp_path / deeper
    arguments = ["demo", "--smoke", "--out", out]
    result = run_python(READ_ONLY, tmp_path, *arguments, prefix=namespace_or_skip())
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith(f"error: {out}")
    assert result.stderr.endswith("cannot be written: Read-only file system\n")
