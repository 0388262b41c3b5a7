"""The done-map of a Gram matrix in a file: which tiles it holds, so that an interrupted run goes on where it stopped.

Beside K.npy stands the directory K.npy.done:

    about.json  what is computed (network, kind, dtype, shapes, hashes of the points, tiles), and whether it is complete
    0of4, ...   what each part has done: a byte for every tile of the matrix, 1 if the tile and its mirror are on disk

Why this survives a kill at any moment: about.json and K.npy appear whole, under their names, or not at all; about.json
comes first, so K.npy without it is somebody else's; a byte is set after fdatasync of the data it stands for; writing a
tile once more writes the same bytes. Every part has a map of its own, locked while it runs, so none overwrites another.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._tiles import Record, Tile, Tiles

Array = NDArray[Any]

#: Seconds between two flushes: what a kill can lose, beside the tile in progress.
_FLUSH = 1.0
#: Bytes written at once.
_BLOCK = 4 << 20


class MatrixFile(Record):
    """The file of one call: an output with slice assignment that keeps its done-map."""

    def __init__(
        self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any], about: dict[str, Any], part: tuple[int, int],
        tell: bool,
    ) -> None:  # fmt: skip
        self.path, self.shape, self.dtype, self.part, self.tell = path, shape, dtype, part, tell
        self.folder = path.with_name(path.name + ".done")
        self.name = f"{part[0]}of{part[1]}"
        self.about = about
        self._data = self._map = -1
        self._offset = 0
        self._pending, self._flushed = list[int](), 0.0

    # --- the state on disk -------------------------------------------------------------------------------------------

    def check(self) -> bool:
        """Refuse what cannot work; True if there is nothing left to do. Writes nothing."""
        exists = self.path.exists()  # looked at first: K.npy appears after about.json
        stored = self._stored()
        if exists and stored is None:
            raise FileExistsError(f"{self.path} exists and has no done-map {self.folder.name}: gram_to_file did not "
                                  "make it; use another path, or delete it")  # fmt: skip
        if stored is not None:
            self._compare(stored)
            if exists:
                self.view()
            elif (stored["complete"] or self._marks().any()) and not self.path.exists():
                raise FileNotFoundError(f"{self.path} is missing, but {self.folder.name} says that tiles of it are "
                                        f"done; put it back, or delete {self.folder} to begin anew")  # fmt: skip
            if stored["complete"]:
                return True
        if not exists:
            self._check_room()
        return False

    def _stored(self) -> dict[str, Any] | None:
        """about.json, None if there is none."""
        about = self.folder / "about.json"
        try:
            stored = json.loads(about.read_text())
            if not isinstance(stored, dict) or "format" not in stored:
                raise ValueError("it does not look like one")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{about} is not a done-map: {error}; delete {self.folder} to begin anew") from None
        return stored

    def _compare(self, stored: dict[str, Any]) -> None:
        """Refuse another computation; take over the tiles of this one."""
        for key in self.about:
            old, new = stored.get(key), self.about[key]
            if key == "tiling" and isinstance(old, dict) and old.keys() == new.keys() and old["unit"] == new["unit"]:
                self.about["tiling"] = old  # another machine, or another number of parts, may prefer other tiles
            elif old != new:
                what = f"{key} was {_short(old)}, now it is {_short(new)}"
                if key in ("X", "Y") and old and new and old["shape"] == new["shape"]:
                    what = f"the values of {key} were others"
                raise ValueError(f"{self.path} belongs to another computation: {what}; use another path, or delete "
                                 f"{self.path} and {self.folder} to begin anew")  # fmt: skip

    def _check_room(self) -> None:
        needed = self.shape[0] * self.shape[1] * self.dtype.itemsize + 4096
        free = shutil.disk_usage(self.path.parent).free
        with suppress(FileNotFoundError):  # of a run that was killed: its room is used again
            free += 512 * (self.folder / f"{self.name}.new").stat().st_blocks
        if needed > free:
            raise OSError(errno.ENOSPC, f"{self.path} needs {needed:,} bytes, {free:,} are free on its disk")

    def view(self) -> np.memmap[Any, Any]:
        """The file, mapped read-only, if it is what it should be."""
        try:
            array: np.memmap[Any, Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
            order = "" if array.flags.c_contiguous else " in Fortran order"
            found = f"{array.shape} {array.dtype}{order}"
        except (AttributeError, ValueError, EOFError) as error:
            found = f"no .npy file ({error})"
        if found != f"{self.shape} {self.dtype}":
            raise ValueError(f"{self.path} is {found}, its done-map belongs to {self.shape} {self.dtype}; it was "
                             f"changed: delete it and {self.folder} to begin anew")  # fmt: skip
        return array

    def _marks(self) -> NDArray[np.bool_]:
        """(tiles,) what is done, by any part."""
        done = np.zeros(self._tiles().count, dtype=bool)
        for path in self.folder.iterdir():
            if re.fullmatch(r"\d+of\d+", path.name):
                marks = np.frombuffer(path.read_bytes(), np.uint8)[: len(done)]
                done[: len(marks)] |= marks == 1
        return done

    def _tiles(self) -> Tiles:
        tiling = self.about["tiling"]
        return Tiles(*self.shape, self.about["Y"] is None, tiling["side"], tiling["unit"])

    # --- one run -----------------------------------------------------------------------------------------------------

    def begin(self) -> Tiles:
        """Open or make the file; the tiles of this part that are left."""
        self.folder.mkdir(exist_ok=True)
        self._map = os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(self._map, f"part {self.part} of {self.path} is being computed by another process")
        new = self.folder / f"{self.name}.new"  # ours alone: we hold the lock
        new.unlink(missing_ok=True)  # of a run that was killed: half a file, or a second name of a published one
        if self._stored() is None:
            self._write_about(new, complete=False)
            _publish(new, self.folder / "about.json")
        self.check()  # again: another part may have been first, with other tiles
        if not self.path.exists():
            self._create(new)
            _publish(new, self.path)
        self._offset = self.view().offset
        self._data = os.open(self.path, os.O_RDWR)
        self._all, done = self._tiles(), self._marks()
        self.side = self._all.side
        self._flushed = time.monotonic()
        if self.tell and done.any():
            print(f"ntkfast: {self.path}: {done.sum()} of {len(done)} tiles are done", file=sys.stderr)
        k, of = self.part
        self._all.wanted = np.zeros_like(done)
        self._all.wanted[k::of] = ~done[k::of]
        return self._all

    def _write_about(self, path: Path, complete: bool) -> None:
        with path.open("w") as file:
            file.write(json.dumps(self.about | {"complete": complete}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _create(self, new: Path) -> None:
        """The whole file, its room on the disk reserved."""
        array = np.lib.format.open_memmap(new, mode="w+", dtype=self.dtype, shape=self.shape)
        del array
        try:
            with new.open("r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
                os.fsync(file.fileno())
        except OSError as error:
            new.unlink(missing_ok=True)
            size = self.shape[0] * self.shape[1] * self.dtype.itemsize
            raise OSError(error.errno, f"cannot reserve {size:,} bytes for {self.path}: {error.strerror}") from None

    def __setitem__(self, key: Any, value: Array) -> None:
        """[..., rows, cols]. Written, not mapped: pages of a mapping would count as memory of this process, a full
        disk would kill it, and the neighbours of an entry would be written with it."""
        rows, cols = key[-2:]
        item, width = self.dtype.itemsize, self.shape[1]
        step = max(1, _BLOCK // (item * max(1, cols.stop - cols.start)))
        for start in range(rows.start, rows.stop, step):
            stop = min(rows.stop, start + step)
            block = np.ascontiguousarray(value[start - rows.start : stop - rows.start], self.dtype)
            if cols.stop - cols.start == width:
                block = block.reshape(1, -1)
            for k, row in enumerate(block):
                _write(self._data, row, self._offset + ((start + k) * width + cols.start) * item)

    def stored(self, tile: Tile) -> None:
        """To be marked with the next flush."""
        self._pending.append(self._all.number(tile))
        if time.monotonic() - self._flushed >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Data first, then the marks that say that they are there."""
        os.fdatasync(self._data)
        for index in self._pending:
            os.pwrite(self._map, b"\1", index)
        os.fdatasync(self._map)
        self._pending.clear()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Keep what is done, also after an error or Ctrl-C."""
        try:
            if self._pending:
                self.flush()
        finally:
            for handle in (self._data, self._map):
                if handle >= 0:
                    os.close(handle)
            self._data = self._map = -1

    def finish(self) -> None:
        """Say so if this was the last part."""
        left = int((~self._marks()).sum())
        if left:
            if self.tell:
                print(
                    f"ntkfast: {self.path}: part {self.part} is done; {left} tiles of others are not", file=sys.stderr
                )
            return
        # Two parts may end together and both write it: the same text.
        new = self.folder / f"{self.name}.complete"
        self._write_about(new, complete=True)
        new.replace(self.folder / "about.json")


def _short(value: Any) -> str:
    text = repr(tuple(value) if isinstance(value, list) else value["shape"] if isinstance(value, dict) else value)
    return text if len(text) <= 200 else text[:197] + "..."


def _lock(handle: int, message: str) -> None:
    """Locked until the process ends; file systems without locks go without."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(message) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _publish(new: Path, path: Path) -> None:
    """Give a finished file its name, unless another part was first."""
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError as error:  # a file system without hard links
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        if not path.exists():
            new.rename(path)
    with suppress(FileNotFoundError):
        new.unlink()


def _write(handle: int, row: Array, offset: int) -> None:
    data = row.data.cast("B")
    while len(data):
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
