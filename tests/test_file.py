"""gram_to_file: killed, interrupted, shared and resumed; whatever happens, the file ends up as gram."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from conftest import assert_close

import ntkfast as nf
from ntkfast import _conv, _done, _file, _tiles, reference
from ntkfast.__main__ import main

NET = nf.resnet(3)
BIASED = nf.fully_connected(2, "erf", bias_variance=0.2)
X = np.random.default_rng(1).standard_normal((150, 5))
Y = np.random.default_rng(2).standard_normal((101, 5))
IMAGES = np.random.default_rng(3).standard_normal((23, 5, 4, 2))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles although the matrices are small."""
    monkeypatch.setattr(_file, "_SIDE", 48)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "K.npy"


def fill(path, net=NET, x=X, y=None, **options):
    return nf.gram_to_file(net, x, path, y, **{"progress": False} | options)


def complete(path):
    return json.loads((path.with_name("K.npy.done") / "about.json").read_text())["complete"]


#: What is called once for every tile, with the tile as second argument.
DENSE, CONVOLUTIONAL = (_tiles, "_prepare"), (_conv, "parts")


def computed(monkeypatch, kind=DENSE):
    """A list that grows by every tile that is computed."""
    found, real = [], getattr(*kind)
    monkeypatch.setattr(*kind, lambda job, tile, **rest: (found.append(tile), real(job, tile, **rest))[1])
    return found


class StopHereError(Exception):
    pass


def stop_after(monkeypatch, count, error=StopHereError, kind=DENSE):
    """Raise when `count` tiles are done."""
    real, left = getattr(*kind), [count]

    def prepare(job, tile, **rest):
        if not left[0]:
            raise error
        left[0] -= 1
        return real(job, tile, **rest)

    monkeypatch.setattr(*kind, prepare)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("net", "route"), [
    (NET, {}), (NET, {"NTKFAST_PATH": "table"}), (NET, {"NTKFAST_PATH": "recursion"}), (NET, {"NTKFAST_GEMM": "blas"}),
    (BIASED, {}), (BIASED, {"NTKFAST_GEMM": "blas"}),
], ids=str)  # fmt: skip
def test_the_file_holds_gram(path, monkeypatch, net, route, dtype):
    for name, value in route.items():
        monkeypatch.setenv(name, value)
    for y, get in ((None, "ntk"), (Y, "nngp"), (None, "last_hidden")):
        x, other = X.astype(dtype), None if y is None else y.astype(dtype)
        tiles = computed(monkeypatch)
        K = fill(path, net, x, other, get=get)
        assert len(tiles) > 5
        assert isinstance(K, np.memmap)
        assert K.dtype == dtype
        assert not K.flags.writeable
        wanted = nf.gram(net, x, other, get=get)
        if "NTKFAST_GEMM" in route:  # the rounding of the BLAS depends on the sizes of its blocks
            root = np.sqrt(np.outer(*(reference.diagonal(net, z, get=get) for z in (X, X if y is None else Y))))
            assert_close(K, wanted, root, 200 * np.finfo(dtype).eps)
        else:
            np.testing.assert_array_equal(K, wanted)
        if y is None:
            np.testing.assert_array_equal(K, K.T)
        assert complete(path)
        path.unlink()
        shutil.rmtree(path.with_name("K.npy.done"))


@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("build", [nf.conv_net, nf.conv_resnet])
def test_the_file_holds_gram_of_images(path, monkeypatch, build, readout):
    monkeypatch.setattr(_file, "_SIDE", 6)
    for dtype, y, get, axes in (("f8", None, "ntk", 2), ("f4", IMAGES[:13] + 0.1, "nngp", 2), ("f4", None, "ntk", 1)):
        net, x = build(2, window=(3,) * axes, readout=readout), IMAGES.astype(dtype)
        y = None if y is None else y.astype(dtype)
        if axes == 1:
            x = x[:, 2]
        tiles = computed(monkeypatch, CONVOLUTIONAL)
        K = fill(path, net, x, y, get=get)
        assert len(tiles) == (10 if y is None else 12)
        assert K.dtype == dtype
        np.testing.assert_array_equal(K, nf.gram(net, x, y, get=get))
        assert complete(path)
        path.unlink()
        shutil.rmtree(path.with_name("K.npy.done"))


@pytest.mark.parametrize(("nanoseconds", "n", "parts", "side"), [
    (4e6, 20_000, 1, 64), (4e6, 200, 8, 16), (4e6, 30, 100, 8), (4e3, 20_000, 1, 2048), (4e3, 500, 100, 128),
])  # fmt: skip
def test_slow_kernels_have_small_tiles(monkeypatch, nanoseconds, n, parts, side):
    monkeypatch.undo()
    problem = _conv.Problem(nf.conv_net(1), np.ones((n, 1, 1)), None, None, None, "channels_last")
    monkeypatch.setattr(problem, "nanoseconds", lambda: nanoseconds)
    assert _file._new_tiling(problem, "ntk", parts) == {"side": side, "unit": 1}


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (97, 48)])
def test_sizes(path, shape):
    x, y = np.ones((shape[0], 2)), np.full((shape[1], 2), 0.5)
    np.testing.assert_array_equal(fill(path, x=x, y=y), nf.gram(NET, x, y))
    np.testing.assert_array_equal(np.load(path), nf.gram(NET, x, y))


def test_real_tiles(path, monkeypatch):
    monkeypatch.undo()
    x = np.random.default_rng(5).standard_normal((2500, 3))
    tiles = computed(monkeypatch)
    np.testing.assert_array_equal(fill(path, x=x), nf.gram(NET, x))
    assert len(tiles) > 3


def test_a_complete_file_is_returned_at_once(path, monkeypatch):
    wanted = fill(path).copy()
    tiles = computed(monkeypatch)
    np.testing.assert_array_equal(fill(path), wanted)
    assert tiles == []


def test_progress_and_what_is_done(path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StopHereError):
            fill(path)
    fill(path, part=(1, 2), progress=True)
    error = capsys.readouterr().err
    assert re.search(r"K\.npy: 2 of 10 tiles are done", error)
    assert re.search(r"part \(1, 2\) is done; 4 tiles of others are not", error)
    fill(path)
    assert complete(path)


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("route", ["fused", "blas"])
def test_an_interrupted_run_resumes(path, monkeypatch, error, route):
    monkeypatch.setenv("NTKFAST_GEMM", route)
    wanted = fill(path.with_name("whole.npy")).copy()
    with monkeypatch.context() as patch:
        first = computed(patch)
        stop_after(patch, 4, error)
        with pytest.raises(error):
            fill(path)
    assert not complete(path)
    second = computed(monkeypatch)
    np.testing.assert_array_equal(fill(path), wanted)
    assert complete(path)
    starts = [(tile.rows.start, tile.cols.start) for tile in first[:4] + second]
    assert len(set(starts)) == len(starts) == 10


@pytest.mark.parametrize("links", [1, 2])
def test_stopped_while_a_file_has_two_names(path, monkeypatch, links):
    """A run that ends between link and unlink of a new file leaves a second name, which must not be written to."""
    real, left = os.link, [links]

    def link(*names):
        real(*names)
        left[0] -= 1
        if not left[0]:
            raise StopHereError

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(StopHereError):
            fill(path)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StopHereError):
            fill(path)
    assert not complete(path)
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))
    assert complete(path)


def test_images_resume_in_either_format(path, monkeypatch):
    monkeypatch.setattr(_file, "_SIDE", 6)
    net, first = nf.conv_net(2, readout="gap"), np.ascontiguousarray(np.moveaxis(IMAGES, -1, 1))
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt, CONVOLUTIONAL)
        with pytest.raises(KeyboardInterrupt):
            fill(path, net, IMAGES)
    assert not complete(path)
    fill(path, net, IMAGES, part=(1, 3))
    wanted, tiles = nf.gram(net, IMAGES), computed(monkeypatch, CONVOLUTIONAL)
    np.testing.assert_array_equal(fill(path, net, first, data_format="channels_first"), wanted)
    assert len(tiles) == 4
    assert complete(path)
    for other, words in ((nf.conv_net(2), "net was"), (nf.conv_net(2, window=5, readout="gap"), "net was")):
        with pytest.raises(ValueError, match=words):
            fill(path, other, IMAGES)
    with pytest.raises(ValueError, match=r"X was \[23, 5, 4, 2\], now it is \[23, 4, 5, 2\]"):
        fill(path, net, IMAGES.swapaxes(1, 2))
    with pytest.raises(ValueError, match="the values of X were others"):
        fill(path, net, -IMAGES)


# What a process does that is killed at its k-th step, and what one does that is killed at any moment.
KILLED = """
import itertools, json, os, random, shutil, signal, sys, time
import numpy as np, ntkfast as nf
from ntkfast import _conv, _done, _file, _tiles

_file._SIDE, _done._FLUSH = SIDE, 0.0
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((ROWS, *SHAPE)), rng.standard_normal((55, *SHAPE))
if len(SHAPE) == 1:
    CASES = [(nf.resnet(3), X, None), (nf.fully_connected(2), X.astype("f4"), Y.astype("f4"))]
else:
    CASES = [(nf.conv_net(2, readout="gap"), X, None), (nf.conv_net(2), X.astype("f4"), Y[:15].astype("f4"))]
WANTED = [nf.gram(*case) for case in CASES]
STEPS = ("open", "write", "pwrite", "fdatasync", "fsync", "posix_fallocate", "link", "rename", "replace", "unlink",
         "mkdir", "close")

def call(case, path="K.npy"):
    net, x, y = CASES[case]
    return nf.gram_to_file(net, x, path, y, progress=False)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def count_down(steps):
    "Die at a step: before it, or, if it writes rows (every ninth is a step), in the middle."
    left, rows = [steps], [0]
    def wrap(name, real):
        def step(*arguments, **options):
            is_row = name == "pwrite" and len(arguments[1]) > 1
            rows[0] += is_row
            if is_row and rows[0] % 9:
                return real(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                if is_row:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                die()
            return real(*arguments, **options)
        return step
    for name in STEPS:
        setattr(os, name, wrap(name, getattr(os, name)))

def slowly():
    "Every step takes a while, so that a kill at any moment meets any step."
    def wrap(real):
        def step(*arguments, **options):
            time.sleep(2e-4)
            return real(*arguments, **options)
        return step
    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print("child:", type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def marked():
    try:
        about = json.load(open("K.npy.done/about.json"))
        done = open("K.npy.done/0of1", "rb").read()
    except FileNotFoundError:
        return set()
    shape, tiling = about["shape"], about["tiling"]
    tiles = _tiles.Tiles(*shape, about["Y"] is None, tiling["side"], tiling["unit"])
    return {(t.rows.start, t.cols.start) for t, mark in zip(tiles, done) if mark}

def log_tiles():
    "Append every computed tile to a file of this run."
    log, real = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), getattr(*TILE)
    def prepare(job, tile, **rest):
        os.write(log, f"{tile.rows.start} {tile.cols.start}\\n".encode())
        return real(job, tile, **rest)
    setattr(*TILE, prepare)

def logged():
    return [tuple(map(int, line.split())) for line in open("log")] if os.path.exists("log") else []

def clear():
    shutil.rmtree("K.npy.done")
    os.unlink("K.npy")

def check_equal(case):
    assert np.array_equal(np.load("K.npy"), WANTED[case]), "the file differs from gram"
    assert json.load(open("K.npy.done/about.json"))["complete"]
    assert sorted(os.listdir("K.npy.done")) == ["0of1", "about.json"], os.listdir("K.npy.done")
"""

AT_EVERY_STEP = """
kills = 0
for case in (0, 1):
    for steps in itertools.count(1):
        def work():
            log_tiles()
            count_down(steps)
            call(case)
        pid = child(work)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        kills += 1
        before = marked()
        def resume():
            log_tiles()
            call(case)
        assert os.waitpid(child(resume), 0)[1] == 0, steps
        assert not before & set(logged()), "a tile was computed again"
        check_equal(case)
        assert len(logged()) == len(set(logged())) == len(marked()) - len(before)
        clear()
    check_equal(case)
    clear()
print(kills)
"""

AT_ANY_MOMENT = """
random.seed(0)
kills, case, finished, again = 0, 0, 0, 0
while kills < 50 or os.path.exists("K.npy.done"):
    before = marked()
    def work():
        slowly()
        log_tiles()
        call(case)
    pid = child(work)
    if kills < 50:
        time.sleep(random.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    done = set(logged())
    if os.path.exists("log"):
        os.unlink("log")
    assert not before & done, "a tile was computed again"
    assert before <= marked(), "a mark was lost"
    again += len(done) - len(marked() - before)
    if os.WIFSIGNALED(status):
        kills += 1
        assert len(done) - len(marked() - before) <= 1, "more than the tile in progress was lost"
        continue
    assert status == 0
    check_equal(case)
    clear()
    finished, case = finished + 1, 1 - case
print(kills, finished)
"""


def killed(rows, shape=(4,)):
    """The beginning of such a process: its points."""
    side, tile = (48, "_tiles, '_prepare'") if len(shape) == 1 else (8, "_conv, 'parts'")
    return f"ROWS, SHAPE, SIDE = {rows}, {shape}, {side}\n{KILLED}\nTILE = {tile}\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_killed_at_every_step(fresh_python):
    # Rows written, flushes, marks, and everything that makes and names files.
    code = killed(60) + AT_EVERY_STEP
    assert int(fresh_python(code, timeout=300, OMP_NUM_THREADS="1")) > 80


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
@pytest.mark.parametrize(("rows", "shape"), [(110, (4,)), (20, (4, 3, 2))], ids=["points", "images"])
def test_killed_fifty_times(fresh_python, rows, shape):
    code = killed(rows, shape) + AT_ANY_MOMENT
    kills, finished = map(int, fresh_python(code, timeout=300, OMP_NUM_THREADS="1").split())
    assert kills == 50
    assert finished >= 2


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_a_file_that_resumes(path, monkeypatch):
    monkeypatch.undo()
    np.save(path.with_name("X.npy"), np.random.default_rng(0).standard_normal((3000, 4)))
    arguments = ("gram", "X.npy", "--out", "K.npy", "--network", "fully_connected", "--depth", "600", "--activation",
                 "erf", "--quiet", "--resume")  # fmt: skip
    command = [sys.executable, "-m", "ntkfast", *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=path.parent)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _marks(path):
            time.sleep(0.02)
        sent = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=30)
    finally:
        run.kill()
    assert time.monotonic() - sent < 3
    assert (run.returncode, error) == (130, "ntkfast: interrupted\n")
    assert 0 < _marks(path) < 400
    assert not complete(path)


def _marks(path):
    try:
        return (path.with_name("K.npy.done") / "0of1").read_bytes().count(1)
    except FileNotFoundError:
        return 0


# --- parts -----------------------------------------------------------------------------------------------------------

AT_ONCE = """
for turn in range(15):
    case, start = turn % 2, time.time() + 0.01
    def work(k):
        net, x, y = CASES[case]
        while time.time() < start:
            pass
        nf.gram_to_file(net, x, "K.npy", y, part=(k, 4), progress=False)
    pids = [child(lambda: work(k)) for k in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4, turn
    assert np.array_equal(np.load("K.npy"), WANTED[case]), turn
    assert json.load(open("K.npy.done/about.json"))["complete"]
    assert sorted(os.listdir("K.npy.done")) == [f"{k}of4" for k in range(4)] + ["about.json"]
    clear()
print("good")
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_parts_at_once(fresh_python):
    assert fresh_python(killed(110) + AT_ONCE, OMP_NUM_THREADS="1") == "good\n"


def test_parts_one_after_the_other(path, monkeypatch):
    tiles = computed(monkeypatch)
    for k in range(3):
        assert not path.exists() or not complete(path)
        fill(path, part=(k, 3))
    assert len(tiles) == len({(t.rows.start, t.cols.start) for t in tiles}) == 10
    assert complete(path)
    np.testing.assert_array_equal(np.load(path), nf.gram(NET, X))


def test_another_number_of_parts_keeps_what_is_done(path, monkeypatch):
    tiles = computed(monkeypatch)
    fill(path, part=(1, 3))
    fill(path, part=(0, 2))
    fill(path)
    assert len(tiles) == len({(t.rows.start, t.cols.start) for t in tiles}) == 10
    np.testing.assert_array_equal(np.load(path), nf.gram(NET, X))


def test_more_parts_than_tiles(path):
    for k in reversed(range(20)):
        fill(path, x=X[:10], part=(k, 20))
    np.testing.assert_array_equal(np.load(path), nf.gram(NET, X[:10]))


def test_one_process_for_each_part(path, monkeypatch):
    def prepare(job, tile):
        with pytest.raises(RuntimeError, match=r"part \(0, 1\) of .*K\.npy is being computed"):
            fill(path)
        raise StopHereError

    with monkeypatch.context() as patch:
        patch.setattr(_tiles, "_prepare", prepare)
        with pytest.raises(StopHereError):
            fill(path)
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))


# --- refusals --------------------------------------------------------------------------------------------------------


def state(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


NUDGED = X.copy()
NUDGED[100, 3] = np.nextafter(NUDGED[100, 3], 9)
OTHERS = {
    "network": ({"net": nf.resnet(4)}, "net was"),
    "kind": ({"get": "nngp"}, "get was 'ntk', now it is 'nngp'"),
    "dtype": ({"x": X.astype("f4")}, "dtype was 'float64', now it is 'float32'"),
    "one bit": ({"x": NUDGED}, "the values of X were others"),
    "rows": ({"x": X[:99]}, r"shape was \(150, 150\), now it is \(99, 99\)"),
    "columns": ({"x": X[:, :4]}, r"X was \[150, 5\], now it is \[150, 4\]"),
    "other points": ({"y": X}, "Y was None"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_another_computation_is_refused(path, monkeypatch, other, finished):
    with monkeypatch.context() as patch:
        if finished:
            fill(path)
        else:
            stop_after(patch, 3)
            with pytest.raises(StopHereError):
                fill(path)
    before, (options, words) = state(path.parent), OTHERS[other]
    with pytest.raises(ValueError, match=f"K.npy belongs to another computation: {words}"):
        fill(path, **options)
    assert state(path.parent) == before
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))


def test_functions_of_one_name_are_told_apart(path):
    def net(f):
        return nf.fully_connected(2, nf.Activation.from_function(f, name="f"))

    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    fill(path, net(np.arctan), unit)
    fill(path, net(np.arctan), unit)
    with pytest.raises(ValueError, match="functions was"):
        fill(path, net(lambda x: np.arctan(x) + 1e-3 * x), unit)


def test_versions_are_told_apart(path, monkeypatch):
    fill(path)
    monkeypatch.setattr(_file, "FORMAT", 2)
    with pytest.raises(ValueError, match="format was 1, now it is 2"):
        fill(path)
    monkeypatch.undo()
    monkeypatch.setattr(nf, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"ntkfast was '.*', now it is '9.9'"):
        fill(path)


def test_files_of_others_are_refused(path):
    np.save(path, np.zeros((150, 150)))
    before = state(path.parent)
    with pytest.raises(FileExistsError, match=r"K\.npy exists and has no done-map K\.npy\.done"):
        fill(path)
    assert state(path.parent) == before


@pytest.mark.parametrize("content", ["shape", "dtype", "order", "cut", "text"])
def test_a_file_that_was_changed_is_refused(path, monkeypatch, content):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StopHereError):
            fill(path)
    if content == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif content == "text":
        path.write_text("precious")
    else:
        np.save(path, {"shape": np.zeros((150, 149)), "dtype": np.zeros((150, 150), "f4"),
                       "order": np.zeros((150, 150), order="F")}[content])  # fmt: skip
    before = state(path.parent)
    with pytest.raises(ValueError, match="it was changed"):
        fill(path)
    assert state(path.parent) == before


def test_a_missing_file_or_a_broken_map(path):
    fill(path)
    path.rename(path.with_name("moved.npy"))
    with pytest.raises(FileNotFoundError, match="is missing, but"):
        fill(path)
    path.with_name("moved.npy").rename(path)
    about = path.with_name("K.npy.done") / "about.json"
    for text in ("", "[]", "{}", '{"format": '):
        about.write_text(text)
        with pytest.raises(ValueError, match="is not a done-map"):
            fill(path)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"get": "ntkk"}, ValueError, "get='ntkk' is unknown; use one of ntk"),
    ({"get": ("ntk", "nngp")}, ValueError, "writes one kernel into one file"),
    ({"get": ["ntk"]}, ValueError, "writes one kernel into one file"),
    ({"part": (1, 1)}, ValueError, r"part=\(1, 1\): use \(k, of\)"),
    ({"part": (-1, 2)}, ValueError, "use"), ({"part": 3}, ValueError, "use"), ({"part": (0, 1, 2)}, ValueError, "use"),
    ({"part": (0.5, 2)}, ValueError, "use"), ({"part": "01x"}, ValueError, "use"),
    ({"net": "resnet"}, TypeError, "net must be a Network"),
    ({"x": np.full((3, 2), np.nan)}, ValueError, "X must be finite: row 0"),
    ({"y": np.ones((3, 2))}, ValueError, "X has 5 features and Y has 2"),
    ({"x": X.astype("f2")}, TypeError, "float16"),
    ({"data_format": "channels_first"}, ValueError, "is for images"),
    ({"net": nf.conv_net(2)}, ValueError, r"X must have shape \(n, \*grid, channels\)"),
    ({"net": nf.conv_net(2), "x": IMAGES, "y": IMAGES[:, :3]}, ValueError, r"X has images of \(5, 4\) positions"),
    ({"net": nf.conv_net(2), "x": IMAGES, "data_format": "nchw"}, ValueError, "data_format='nchw' is unknown"),
    ({"net": nf.conv_net(9, gain=1e60), "x": IMAGES}, OverflowError, "does not fit"),
    ({"net": nf.fully_connected(2000, gain=9.0)}, OverflowError, "does not fit"),
])  # fmt: skip
def test_bad_arguments_leave_nothing_behind(path, options, error, words):
    with pytest.raises(error, match=words):
        fill(path, **options)
    assert state(path.parent) == {}
    assert list(path.parent.iterdir()) == []


def test_bad_places(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no does not exist"):
        fill(tmp_path / "no" / "K.npy")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        fill(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(PermissionError, match="is not writable"):
        fill(tmp_path / "K.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_work(path, monkeypatch):
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=180_000))
    with pytest.raises(OSError, match=r"K\.npy needs 184,096 bytes, 180,000 are free"):
        fill(path)
    assert list(path.parent.iterdir()) == []
    np.testing.assert_array_equal(fill(path, x=X[:140]), nf.gram(NET, X[:140]))


def test_a_full_disk_on_reserving_leaves_no_half_file(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"cannot reserve 180,000 bytes for .*K\.npy: No space left"):
            fill(path)
    assert {file.name for file in state(path.parent)} == {"about.json", "0of1"}
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))


def test_a_failed_flush_marks_nothing(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(_done, "_FLUSH", 0.0)
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            fill(path)
    assert _marks(path) == 0
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))


def test_file_systems_without_links_and_locks(path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(_done.fcntl, "flock", refuse)
    np.testing.assert_array_equal(fill(path), nf.gram(NET, X))
    assert complete(path)


# --- memory, command line --------------------------------------------------------------------------------------------

MEMORY = """
import numpy as np, ntkfast as nf
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
X = np.random.default_rng(0).standard_normal((8000, 4))
nf.gram_to_file(nf.resnet(3), X[:50], "small.npy", progress=False)
now = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
nf.gram_to_file(nf.resnet(3), X, "K.npy", progress=False)
print(status("VmHWM") - now)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory(fresh_python):
    # 512 MB of result. 64 MB a thread are promised, 40 are allocated; huge pages may double what is resident.
    assert int(fresh_python(MEMORY, OMP_NUM_THREADS="1")) < 128 << 20


@pytest.mark.parametrize("kind", [DENSE, CONVOLUTIONAL], ids=["points", "images"])
def test_many_tiles_take_no_memory(path, monkeypatch, kind):
    """A file may have millions: a mark for each of them, not an object."""
    net, x = (NET, X[:1] + np.arange(600)[:, None]) if kind is DENSE else (nf.conv_net(1), np.ones((600, 1, 1)))
    monkeypatch.setattr(_file, "_new_tiling", lambda *_: {"side": 1, "unit": 1})
    monkeypatch.setenv("NTKFAST_GEMM", "blas")  # one pass takes whole panels
    fill(path.with_name("small.npy"), net, x[:2], progress=True)  # imports what is imported once
    for part, progress in (((0, 1), False), ((0, 1), True), ((1, 2), False)):
        with monkeypatch.context() as patch:
            stop_after(patch, 3, kind=kind)
            tracemalloc.start()
            try:
                with pytest.raises(StopHereError):
                    fill(path, net, x, part=part, progress=progress)
                most = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert _marks(path) == (6 if progress or part[0] else 3)
        assert most < 4 * 180_300 + (1 << 18)


@pytest.mark.parametrize(("n", "m", "side", "unit"), [(7, 7, 2, 1), (50, 50, 8, 1), (53, 53, 16, 8), (1, 1, 5, 1),
                                                      (20, 33, 6, 4), (33, 20, 6, 4), (5, 40, 64, 8)])  # fmt: skip
def test_the_order_of_tiles(n, m, side, unit):
    """That of the marks of files begun by earlier versions: row by row, from the diagonal on."""
    edges = [sorted({*(min(k, -(-k * j // -(-k // side) // unit) * unit) for j in range(-(-k // side))), k})
             for k in (n, m)]  # fmt: skip
    rows, cols = ([slice(*pair) for pair in itertools.pairwise(e)] for e in edges)
    for symmetric in {False, n == m}:
        tiles = _tiles.Tiles(n, m, symmetric, side, unit)
        wanted = [_tiles.Tile(row, col, symmetric) for i, row in enumerate(rows) for j, col in enumerate(cols)
                  if j >= i or not symmetric]  # fmt: skip
        assert list(tiles) == wanted
        assert tiles.count == len(wanted)
        assert [tiles.number(tile) for tile in wanted] == list(range(len(wanted)))
        assert tiles.side == max(part.stop - part.start for part in rows + cols)
        assert np.sum([tile.entries for tile in wanted]) == (n * (n + 1) // 2 if symmetric else n * m)
        tiles.wanted = np.arange(len(wanted)) % 3 == 1
        assert list(tiles) == list(tiles) == wanted[1::3]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("X.npy", X)
    np.save("Y.npy", Y)
    options = ["gram", "X.npy", "--network", "resnet", "--depth", "3", "--quiet"]
    assert main([*options, "--out", "K.npy", "--part", "1/2"]) == 0
    assert not complete(tmp_path / "K.npy")
    assert main([*options, "--out", "K.npy", "--resume"]) == 0
    assert complete(tmp_path / "K.npy")
    np.testing.assert_array_equal(np.load("K.npy"), nf.gram(NET, X))
    more = ["--other", "Y.npy", "--get", "nngp", "--dtype", "float32"]
    assert main([*options, "--out", "L.npy", "--resume", *more]) == 0
    np.testing.assert_array_equal(np.load("L.npy"), nf.gram(NET, X, Y, get="nngp", dtype="float32"))
    capsys.readouterr()
    for wrong, words in ((["--force"], "--force does not go with"), (["--normalize"], "--normalize does not go with"),
                         (["--get", "ntk,nngp"], "take one kernel"), (["--part", "2/2"], "part=(2, 2)")):  # fmt: skip
        assert main([*options, "--out", "K.npy", "--resume", *wrong]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--out", "K.npy", "--part", "half"])


def test_command_line_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("X.npy", np.moveaxis(IMAGES, -1, 1))
    options = ["gram", "X.npy", "--out", "K.npy", "--network", "conv_net", "--depth", "2", "--window", "3x1", "--quiet",
               "--padding", "circular", "--readout", "gap", "--data-format", "channels_first"]  # fmt: skip
    monkeypatch.setattr(_file, "_SIDE", 6)
    assert main([*options, "--part", "1/2"]) == 0
    assert not complete(tmp_path / "K.npy")
    assert main([*options, "--resume"]) == 0
    assert complete(tmp_path / "K.npy")
    net = nf.conv_net(2, window=(3, 1), padding="circular", readout="gap")
    np.testing.assert_array_equal(np.load("K.npy"), nf.gram(net, IMAGES))
    capsys.readouterr()
    assert main([*options, "--resume", "--bias-variance", "1"]) == 2
    assert "belongs to another computation" in capsys.readouterr().err
