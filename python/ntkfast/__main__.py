"""The command line: ``python -m ntkfast {demo,bench,info,gram}``; the console script ``ntkfast`` is the same.

Whatever only one command needs (matplotlib, scikit-learn, the benchmarks) is imported when that command runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ntkfast
from ntkfast import _core
from ntkfast._arrays import available_memory, check_matrix, result_dtype
from ntkfast._cuda import CudaUnavailable, load_cupy
from ntkfast._images import FORMATS, check_images
from ntkfast._machine import blas, processor
from ntkfast.activation import NAMES
from ntkfast.convolution import PADDINGS, POOLINGS, ConvNetwork
from ntkfast.gram import KINDS, _check_kinds
from ntkfast.network import Network

BUILDERS: dict[str, Callable[..., Network | ConvNetwork]] = {
    "fully_connected": ntkfast.fully_connected,
    "resnet": ntkfast.resnet,
    "bottleneck_resnet": ntkfast.bottleneck_resnet,
    "fixed_readout_resnet": ntkfast.fixed_readout_resnet,
    "conv_net": ntkfast.conv_net,
    "conv_resnet": ntkfast.conv_resnet,
}
#: Keyword arguments of the builders that are options here; which builder has which is read from its signature.
NUMBERS = {
    "gain": "factor of each layer's variance; the constant that keeps unit variances unless given",
    "weight_variance": "of every hidden layer",
    "bias_variance": "of every hidden layer",
    "c_res": "scale of the residual branches, times depth",
    "alpha": "scale of the residual branches; 1/depth unless given",
    "theta": "scale of the residual branches; 1/depth unless given",
    "last_width_ratio": "width of the last layer over that of the others",
}
SWITCHES = {"first_trained": "the first matrix is trained", "readout_trained": "the readout is trained"}
CHOICES = {"padding": (PADDINGS, "what a window sees outside the image"),
           "readout": (POOLINGS, "f of all positions, or of their mean (global average pooling)")}  # fmt: skip
ISA_NAMES = {"v2": "x86-64-v2 (SSE4.2)", "v3": "x86-64-v3 (AVX2)", "v4": "x86-64-v4 (AVX-512)"}

Array = NDArray[Any]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- info ------------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _blas_threads() -> str:
    try:
        from threadpoolctl import threadpool_info  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        return "install threadpoolctl to see its threads"
    pools = [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]
    return ", ".join(f"{pool['num_threads']} threads" for pool in pools) or "threads unknown"


def _cores() -> int:
    """Logical processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Machine and versions in one line, to stand below a table of measurements."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor()}, {_cores()} cores{load}; instruction set {_core.isa()}, {_core.threads()} threads; "
        f"ntkfast {ntkfast.__version__}, NumPy {np.__version__} ({blas()}), Python {platform.python_version()}"
    )


def _gpus() -> str:
    """How many GPUs device="cuda" may use, or the sentence that says why none."""
    try:
        return f'{load_cupy().cuda.runtime.getDeviceCount()} (device="cuda")'
    except CudaUnavailable as error:
        return f"none: {error}"


def info() -> int:
    """Print versions, instruction set, threads, memory and GPUs."""
    memory, isa = available_memory(), _core.isa()
    available = ", ".join(_core.available())
    extras = ("scipy", "scikit-learn", "matplotlib", "tqdm", "threadpoolctl")
    rows = [
        ("ntkfast", ntkfast.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"),
        ("numpy", np.__version__),
        ("BLAS of numpy", f"{blas()} ({_blas_threads()})"),
        ("processor", f"{processor()}, {_cores()} logical cores for this process"),
        ("instruction set", f"{ISA_NAMES.get(isa, isa)}; available: {available} (NTKFAST_ISA forces one)"),
        ("threads", f"{_core.threads()} (OpenMP; OMP_NUM_THREADS or threadpoolctl change it)"),
        ("memory available", "unknown" if memory is None else f"{memory / 1e9:.1f} GB"),
        ("GPUs", _gpus()),
        ("optional packages", ", ".join(f"{name} {_version(name)}" for name in extras)),
    ]
    for name, value in rows:
        print(f"{name:<18} {value}")
    return 0


# --- gram ------------------------------------------------------------------------------------------------------------


def _network(args: argparse.Namespace) -> Network | ConvNetwork:
    """The network of the command line; options that its builder lacks are refused."""
    builder = BUILDERS[args.network]
    legal = [name for name in inspect.signature(builder).parameters if name != "depth"]
    options = {name: getattr(args, name) for name in ("activation", "window", *NUMBERS, *SWITCHES, *CHOICES)}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in legal:
            has = ", ".join(_flag(option) for option in legal)
            raise ValueError(f"{args.network} has no option {_flag(name)}; its options are {has}")
    return builder(args.depth, **given)


def _load(path: Path, net: Network | ConvNetwork, data_format: str) -> Array:
    """A .npy file, mapped and not read, and surely a matrix, or images if the network takes them."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} holds several arrays (.npz); save the one with the points by numpy.save")
    if isinstance(net, ConvNetwork):
        check_images(array, str(path), data_format)
    else:
        check_matrix(array, str(path))
    return array


def _targets(out: Path, kinds: Sequence[str], force: bool) -> list[Path]:
    """The files to write: `out` itself, or one per kernel. Refuses before the work what would fail after it."""
    paths = [out] if len(kinds) == 1 else [out.with_name(f"{out.stem}_{kind}{out.suffix}") for kind in kinds]
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory; --out needs a file name")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the directory {path.parent} does not exist")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; use --force to replace it")
    return paths


def _create(path: Path, target: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """A mapped .npy file whose space on disk is reserved: writing into a hole of a full disk kills the process."""
    try:
        array: Array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        size = shape[0] * shape[1] * dtype.itemsize
        raise OSError(f"cannot write {target} ({size:,} bytes): {error.strerror or error}") from None
    return array


@contextmanager
def _new_files(targets: Sequence[Path], shape: tuple[int, int], dtype: np.dtype[Any]) -> Iterator[tuple[Array, ...]]:
    """Arrays in temporary files beside the targets, renamed at the end; on any error nothing stays behind."""
    parts = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.part") for path in targets]
    try:
        arrays = tuple(_create(part, path, shape, dtype) for part, path in zip(parts, targets, strict=True))
        yield arrays
        for array in arrays:
            array.flush()  # type: ignore[attr-defined]
        for part, path in zip(parts, targets, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _window(text: str) -> int | tuple[int, ...]:
    """3, or 3x5 (rows, columns)"""
    sizes = tuple(int(size) for size in text.split("x"))
    return sizes[0] if len(sizes) == 1 else sizes


def _part(text: str) -> tuple[int, int]:
    """k/of"""
    k, _, of = text.partition("/")
    return int(k), int(of)


def _resumed_gram(args: argparse.Namespace) -> int:
    """Gram matrix of the points of one file, into another that survives interruptions."""
    for name in ("force", "normalize"):
        if getattr(args, name):
            raise ValueError(f"{_flag(name)} does not go with --resume and --part")
    if "," in args.get:
        raise ValueError("--resume and --part take one kernel: run the command once for each, with another --out")
    net = _network(args)
    paths = [args.points] + ([] if args.other is None else [args.other])
    points = [_load(path, net, args.data_format) for path in paths]
    if args.dtype is not None:
        points = [np.asarray(x, args.dtype) for x in points]
    start = time.perf_counter()
    K = ntkfast.gram_to_file(net, points[0], args.out, *points[1:], get=args.get, part=args.part or (0, 1),
                             progress=not args.quiet, data_format=args.data_format)  # fmt: skip
    print(f"{args.out}: {args.get}, {K.shape[0]} x {K.shape[1]} {K.dtype}, {args.out.stat().st_size / 1e6:,.1f} MB")
    print(f"{net}: {time.perf_counter() - start:.2f} s")
    return 0


def gram(args: argparse.Namespace) -> int:
    """Gram matrix of the points of one file, into another."""
    if args.resume or args.part is not None:
        return _resumed_gram(args)
    kinds = _check_kinds(tuple(args.get.split(",")))
    targets = _targets(args.out, kinds, args.force)
    net = _network(args)
    x = _load(args.points, net, args.data_format)
    y = None if args.other is None else _load(args.other, net, args.data_format)
    dtype = result_dtype(args.dtype, (str(args.points), x), *([] if y is None else [(str(args.other), y)]))
    shape = (len(x), len(x) if y is None else len(y))
    start = time.perf_counter()
    with _new_files(targets, shape, dtype) as arrays:
        ntkfast.gram(net, x, y, get=kinds, normalize=args.normalize, dtype=dtype, out=arrays, progress=not args.quiet,
                     data_format=args.data_format)  # fmt: skip
    seconds = time.perf_counter() - start
    for kind, path in zip(kinds, targets, strict=True):
        print(f"{path}: {kind}, {shape[0]} x {shape[1]} {dtype}, {path.stat().st_size / 1e6:,.1f} MB")
    print(f"{net}: {seconds:.2f} s")
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def _add_gram(commands: Any) -> None:
    parser = commands.add_parser(
        "gram", help="Gram matrix of the points of a .npy file", allow_abbrev=False,
        description="Gram matrix of the rows (or images) of a .npy file, written to another; the file appears when it "
        "is complete.",
    )  # fmt: skip
    parser.add_argument("points", type=Path, help=".npy file of shape (n, d), of images (n, *grid, channels)")
    parser.add_argument("--network", required=True, choices=BUILDERS)
    parser.add_argument("--depth", required=True, type=int)
    parser.add_argument("--out", required=True, type=Path, help=".npy file to write")
    parser.add_argument(
        "--other", type=Path, metavar="FILE", help=".npy file of m other points: a rectangular Gram matrix"
    )
    parser.add_argument("--data-format", choices=FORMATS, default=FORMATS[0], help="of images")
    parser.add_argument("--get", default="ntk", metavar="KERNEL[,KERNEL]",
                        help=f"{', '.join(KINDS)}; of several each goes to its own file, OUT_KERNEL.npy")  # fmt: skip
    parser.add_argument("--normalize", action="store_true", help="K_ij / sqrt(K_ii K_jj)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of arithmetic and result; that of the points")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--resume", action="store_true",
                        help="fill OUT tile by tile, beside it what is done (OUT.done): after an interruption the same "
                        "command goes on; one kernel, not normalised")  # fmt: skip
    parser.add_argument("--part", type=_part, metavar="K/OF",
                        help="only the share K (0 to OF - 1) of the tiles, so that processes or machines with a shared "
                        "file system fill one OUT; resumes, too")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    network = parser.add_argument_group("network", "options of the builder; each network has some of them")
    network.add_argument("--activation", metavar="NAME", help=", ".join(NAMES))
    network.add_argument("--window", type=_window, metavar="ODD", help="size, or one for each axis of the image: 3x5")
    for name, (legal, text) in CHOICES.items():
        network.add_argument(_flag(name), choices=legal, help=text)
    for name, text in NUMBERS.items():
        network.add_argument(_flag(name), type=float, metavar="X", help=text)
    for name, text in SWITCHES.items():
        network.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
    parser.set_defaults(run=gram)


def _demo(args: argparse.Namespace) -> int:
    from ntkfast import _demo

    _demo.run(args.out, quick=args.quick, machine=machine())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ntkfast", description="Neural tangent kernels of infinitely wide networks.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ntkfast {ntkfast.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    demo = commands.add_parser("demo", help="a real data set: time, error, accuracy, and a picture", allow_abbrev=False)
    demo.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="the picture, replaced if it exists (demo.png)"
    )
    demo.add_argument("--quick", action="store_true", help="fewer points and depths: a test of the installation")
    demo.set_defaults(run=_demo)
    commands.add_parser("bench", help="this machine's table of time and error", add_help=False)
    commands.add_parser("info", help="versions, instruction set, threads, GPUs").set_defaults(run=lambda _: info())
    _add_gram(commands)
    return parser


def _sentence(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 after an error that is the user's to mend)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:  # before argparse, which would keep options such as --help for itself
        from ntkfast import _bench

        return int(_bench.main(argv[1:]))
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("ntkfast: interrupted", file=sys.stderr)
        return 130
    except (ImportError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        print(f"ntkfast: {_sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
