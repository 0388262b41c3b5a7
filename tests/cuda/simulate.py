"""Run the kernels of csrc/cuda on the CPU: compile a .cu file with the simulator by g++, launch with NumPy arrays.

    library = simulate.build("csrc/cuda/gram.cu")            # or its text
    library.launch("gram_f64", grid=(2, 2), block=256, args=[x, out, 100, 0.5], shared_bytes=4096, seed=1)

Modes: "plain"; "address" (address and undefined-behaviour sanitizers); "thread". The last two need a process that was
started with the sanitizer's library: `simulate.python(mode, ...)` starts one, in which NTKFAST_SIMULATOR gives the mode
of every build. The same tests thus run in all modes.

Python integers go to any integer parameter and floats to double, as with CuPy; NumPy scalars must have the parameter's
size, structures are NumPy records or bytes of the right length. Pointers are NumPy arrays, None or an address. What
does not match the kernel's parameters is an error (a GPU would read rubbish).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
#: options of every build: kernels are compiled without contraction on the GPU as well (compiler.py)
COMMON = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-extern-tls-init",
          "-ffp-contract=off",
          "-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-attributes"]  # fmt: skip
MODES = {
    "plain": ["-O2", "-g1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
#: library to load first and the sanitizer's settings; exit codes tell a report from a failed test
RUNTIME = {
    "address": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1",
                               "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99"}),
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:exitcode=99:ignore_noninstrumented_modules=1"}),
}  # fmt: skip
FOUND = 99
#: names of the kernels that ran in this process
LAUNCHED: set[str] = set()
#: default limit of dynamic shared memory; a kernel may be allowed up to 227 KiB
SHARED_BYTES = 48 * 1024


class SimulationError(RuntimeError):
    """The launch was refused, or the kernel did what CUDA leaves undefined."""


def mode() -> str:
    """The mode of this process."""
    return os.environ.get("NTKFAST_SIMULATOR", "plain")


def missing(mode: str) -> str | None:
    """Why builds of this mode cannot run here, or None."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        return "needs g++ on Linux"
    if mode != "plain" and not _library(mode).is_file():
        return f"needs {RUNTIME[mode][0]} of g++"
    return None


def _library(mode: str) -> Path:
    return _of_compiler(RUNTIME[mode][0])


def _of_compiler(name: str) -> Path:
    shown = subprocess.run([str(COMPILER), f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return Path(shown.stdout.strip()).resolve()


def python(mode: str, *arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` with the runtime library of a mode; returncode FOUND: the sanitizer has a report."""
    variables = os.environ | {"NTKFAST_SIMULATOR": mode, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    if mode != "plain":
        # libstdc++ as well: the sanitizer looks for its throw when the process starts
        variables |= {"LD_PRELOAD": f"{_library(mode)} {_of_compiler('libstdc++.so')}"} | RUNTIME[mode][1]
    if mode == "thread" and shutil.which("setarch"):
        # The thread sanitizer of GCC 12 needs its addresses free: no random layout.
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables | environment)


class Library:
    """Kernels compiled for the CPU. One launch at a time; blocks one after the other."""

    def __init__(self, path: Path, kernels: Sequence[str]):
        self.kernels = tuple(kernels)
        self._handle = ctypes.CDLL(str(path))
        self._handle.sim_error.restype = ctypes.c_char_p
        self._handle.sim_signature.restype = ctypes.c_char_p
        self._lock = threading.Lock()

    def signature(self, kernel: str) -> list[str]:
        """One entry per parameter: p for a pointer, i4, f8 and so on for numbers, s24 for a structure of 24 bytes."""
        text = self._handle.sim_signature(kernel.encode())
        if text is None:
            raise SimulationError(f"no kernel {kernel}; there are {', '.join(self.kernels)}")
        return str(text.decode()).split()

    def launch(self, kernel: str, grid: Any, block: Any, args: Sequence[Any], shared_bytes: int = 0, seed: int = 0,
               most_shared: int = SHARED_BYTES) -> None:  # fmt: skip
        """Run a kernel to its end; seed 0 runs threads in order, others in random orders of their own."""
        kinds = self.signature(kernel)
        if len(kinds) != len(args):
            raise SimulationError(f"{kernel} takes {len(kinds)} arguments, not {len(args)}")
        if shared_bytes > most_shared:
            raise SimulationError(f"{kernel}: {shared_bytes} bytes of dynamic shared memory, {most_shared} allowed")
        pairs = enumerate(zip(args, kinds, strict=True))
        held = [_pack(value, kind, f"{kernel}, argument {k}") for k, (value, kind) in pairs]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(b.ctypes.data for b in held))
        with self._lock:
            sizes = (_three(grid), _three(block), ctypes.c_size_t(shared_bytes))
            failed = self._handle.sim_launch(kernel.encode(), *sizes, ctypes.c_uint(seed), pointers)
            message = self._handle.sim_error().decode()
        if failed:
            raise SimulationError(f"{kernel}: {message}")
        LAUNCHED.add(kernel)


def _three(size: Any) -> Any:
    sizes = [int(size)] if np.isscalar(size) else [int(s) for s in size]
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def _pack(value: Any, kind: str, where: str) -> np.ndarray[Any, Any]:
    """The bytes of one argument, aligned for any type."""
    if kind == "p":
        if isinstance(value, np.ndarray) and value.ndim:
            value = value.ctypes.data
        raw = np.array([0 if value is None else int(value)], np.uint64)
    elif kind[0] == "s":
        data = bytes(value) if isinstance(value, (bytes, bytearray)) else np.asarray(value).tobytes()
        if len(data) != int(kind[1:]):
            raise SimulationError(f"{where}: {len(data)} bytes for a structure of {kind[1:]}")
        raw = np.frombuffer(data, np.uint8)
    else:
        raw = _number(value, kind, where)
    # numpy's own allocations are aligned to 16 bytes
    held = np.zeros((raw.nbytes + 15) // 16 * 2, np.uint64)
    held.view(np.uint8)[: raw.nbytes] = raw.view(np.uint8)
    return held


def _number(value: Any, kind: str, where: str) -> np.ndarray[Any, Any]:
    size = int(kind[1:])
    if isinstance(value, np.generic):
        if value.dtype.itemsize != size or (value.dtype.kind == "f") != (kind[0] == "f"):
            raise SimulationError(f"{where}: {value.dtype} for a parameter {kind}")
        return np.array([value])
    if isinstance(value, (bool, int)) and kind[0] == "i":
        if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
            raise SimulationError(f"{where}: {value} does not fit a parameter {kind}")
        return np.array([value], np.int64 if value < 1 << 63 else np.uint64)
    if isinstance(value, float) and kind == "f8":
        return np.array([value])
    raise SimulationError(f"{where}: {type(value).__name__} for a parameter {kind}")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SimulationError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _wrap(source: Path, text: str) -> tuple[str, list[str]]:
    """The file to compile for preprocessed `text` of `source`, and the names of its extern "C" kernels."""
    launch_bounds = r"(?:\s*__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\))?"
    found = re.findall(rf'extern\s*"C"\s*__global__{launch_bounds}\s*void{launch_bounds}\s*(\w+)\s*\(', text)
    if not found:
        raise SimulationError(f'{source.name}: no kernel of the form extern "C" __global__ void name(')
    rows = "\n".join(f"    SIM_KERNEL({name}, {(a or b).split(',')[0] or 0})" for a, b, name in found)
    dynamic = dict.fromkeys(re.findall(r"extern\s+__shared__[^;]*?(\w+)\s*\[\s*\]\s*;", text)) or {"sim_unused": None}
    # A declaration in a function names the array of the surrounding namespace.
    arrays = "\n".join(f"alignas(128) thread_local unsigned char {d}[sim::kMaxShared];" for d in dynamic)
    names = ", ".join(f"{space}{d}" for d in dynamic for space in ("::", "ntk::"))
    return f"""#include "simulator/words.hpp"
#include "simulator/doors.hpp"
{arrays}
namespace ntk {{
{arrays}
}}
#include "{source}"
using namespace ntk;
static const std::vector<sim::Kernel> kernels{{
{rows}
}};
SIM_DOORS(kernels, {names})
""", [name for _, _, name in found]  # fmt: skip


def _folder() -> Path:
    folder = Path(os.environ.get("NTKFAST_SIMULATOR_DIR") or Path(tempfile.gettempdir()) / f"ntkfast-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def build(source: str | Path, mode: str | None = None, csrc: Path = CSRC) -> Library:
    """Compile a .cu file (a path, absolute or from the repository's root, or the text itself) unless done before."""
    path, names = compile_library(source, mode, csrc)
    return Library(path, names)


def build_all(sources: Sequence[str | Path], mode: str) -> None:
    """Compile several files, two at a time; later builds find them done."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compile_library(source, mode), sources))


def compile_library(source: str | Path, mode: str | None = None, csrc: Path = CSRC) -> tuple[Path, list[str]]:
    """The compiled library and the names of its kernels; it is not loaded."""
    mode = mode or os.environ.get("NTKFAST_SIMULATOR", "plain")
    reason = missing(mode)
    if reason:
        raise SimulationError(f"the CUDA simulator {reason}")
    folder = _folder()
    if isinstance(source, str) and "\n" in source:
        file = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cu"
        _write(file, source.encode())
    else:
        file = CSRC.parent / source  # an absolute path stays what it is
    options = [*COMMON, *MODES[mode], f"-I{csrc}", f"-I{HERE}"]
    text = _run([str(COMPILER), "-E", "-P", "-x", "c++", "-std=c++20", f"-I{csrc}", str(file)])
    wrapper, names = _wrap(file, text)
    simulator = [p.read_bytes() for p in sorted((HERE / "simulator").glob("*.hpp"))]
    version = _run([str(COMPILER), "--version"])
    # the text after the preprocessor, so that a header counts; the file itself, for its lines
    parts = [file.read_bytes(), *simulator, *(t.encode() for t in (text, wrapper, version, " ".join(options)))]
    key = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()[:24]
    target = folder / f"{file.stem}-{mode}-{key}.so"
    if not target.exists():
        main = folder / f"{file.stem}-{mode}-{key}.cpp"
        _write(main, wrapper.encode())
        part = target.with_suffix(f".{os.getpid()}.part")
        _run([str(COMPILER), *options, str(main), "-o", str(part)])
        os.replace(part, target)
    return target, names


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    part.write_bytes(data)
    os.replace(part, path)
