"""From csrc/cuda/<name>.cu to a module on the GPU: compile by NVRTC, keep the binary in a cache, load it by CuPy.

CuPy compiles too, but flushes subnormals (-ftz=true, which cannot be undone), keeps binaries whose included headers
have changed, and needs a driver. Here the options are ours, the key of the cache covers every source, and tests without
a GPU compile what users run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ntkfast
from ntkfast._cuda import CudaUnavailable, load_cupy
from ntkfast._cuda.nvrtc import CompileError, Nvrtc, find

__all__ = ["CompileError", "cache_folder", "compile_cubin", "cubin_file", "load", "sources"]

#: Without contraction, as the CPU's kernels: the formulas say fma where they want it, and compensated sums need the
#: rest as written. Subnormals, quotients and roots as IEEE 754 has them.
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")


def sources() -> Path:
    """The folder with math/*.h and cuda/*.cu that is installed with the package."""
    # an editable installation has two folders
    folders = [Path(p) / "_src" for p in ntkfast.__path__]
    for folder in folders:
        if (folder / "cuda").is_dir():
            return folder
    raise FileNotFoundError(f"the CUDA sources are missing from {folders[0]}: reinstall ntkfast")


def _target(arch: str, nvrtc: Nvrtc) -> tuple[str, str]:
    """(value of -arch, what to take from the compiler) for a device of compute capability `arch`, such as "90"."""
    if int(arch) in nvrtc.archs:
        return f"sm_{arch}", "CUBIN"
    older = [a for a in nvrtc.archs if a < int(arch)]
    if older:
        # the driver translates the rest of the way
        return f"compute_{older[-1]}", "PTX"
    oldest = f"{nvrtc.archs[0] // 10}.{nvrtc.archs[0] % 10}"
    raise CudaUnavailable(
        f"CUDA {nvrtc.version[0]} compiles for compute capability {oldest} and newer, this GPU has "
        f'{int(arch) // 10}.{int(arch) % 10}: pip install "ntkfast[cuda12]" goes back to 5.0'
    )


def compile_cubin(name: str, arch: str, options: Sequence[str] = (), nvrtc: Nvrtc | None = None) -> tuple[bytes, str]:
    """Compile cuda/<name>.cu; no driver, no GPU and no CuPy are needed.

    Parameters
    ----------
    name : the file's name without its suffix
    arch : compute capability without the dot, such as "90"; one that NVRTC does not know yet gives PTX of an older one
    options : further options of NVRTC
    nvrtc : the library, by default the newest that is installed

    Returns
    -------
    The binary, and the compiler's log (registers and spills with the option "--ptxas-options=-v").

    Raises
    ------
    CompileError, CudaUnavailable
    """
    nvrtc = nvrtc or find()
    target, part = _target(arch, nvrtc)
    folder = sources()
    text = (folder / "cuda" / f"{name}.cu").read_text()
    return nvrtc.compile(text, f"{name}.cu", (f"-arch={target}", *OPTIONS, f"-I{folder}", *options), part)


def _key(name: str, target: str, options: Sequence[str], version: tuple[int, int]) -> str:
    """Digest of everything that can change the binary."""
    folder = sources()
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        add(path.relative_to(folder).as_posix().encode(), path.read_bytes())
    add(name.encode(), target.encode(), repr(version).encode(), *(o.encode() for o in (*OPTIONS, *options)))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where binaries are kept: NTKFAST_CACHE_DIR, or ntkfast in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("NTKFAST_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    # an empty or relative value is to be ignored, says the specification
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "ntkfast"


@functools.lru_cache(maxsize=1)
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, for when the cache cannot be written; removed at exit."""
    return tempfile.TemporaryDirectory(prefix="ntkfast-")


def _read(path: Path) -> bytes | None:
    """The binary in a cache file, or None if it is not there or not what was written."""
    try:
        data = path.read_bytes()
        checksum = path.with_suffix(".sha256").read_text()
    except (OSError, ValueError):
        return None
    return data if hashlib.sha256(data).hexdigest() == checksum else None


def _write(path: Path, data: bytes) -> None:
    """Both files under temporary names first: another process sees a whole file or none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for target, content in (path, data), (path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode()):
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=target.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(part, target)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


def cubin_file(name: str, arch: str, options: Sequence[str] = (), nvrtc: Nvrtc | None = None) -> Path:
    """A file with the compiled cuda/<name>.cu (see compile_cubin), from the cache if it is there and sound."""
    nvrtc = nvrtc or find()
    target, part = _target(arch, nvrtc)
    file_name = f"{name}-{target}-{_key(name, target, options, nvrtc.version)[:32]}.{part.lower()}"
    try:
        path = cache_folder() / file_name
    except RuntimeError:  # no home
        path = Path(_own_folder().name) / file_name
    if _read(path) is not None:
        return path
    data, _ = compile_cubin(name, arch, options, nvrtc)
    try:
        _write(path, data)
    except OSError:
        path = Path(_own_folder().name) / file_name
        _write(path, data)
    return path


def load(name: str, options: Sequence[str] = ()) -> Any:
    """The kernels of cuda/<name>.cu on CuPy's current device: a cupy.RawModule.

    Raises
    ------
    CompileError, CudaUnavailable
    """
    cupy = load_cupy()
    device = cupy.cuda.Device()
    return _load(name, tuple(options), device.id, str(device.compute_capability))


@functools.cache
def _load(name: str, options: tuple[str, ...], device: int, arch: str) -> Any:
    cupy = load_cupy()
    nvrtc = find(cupy.cuda.runtime.runtimeGetVersion() // 1000)
    return cupy.RawModule(path=str(cubin_file(name, arch, options, nvrtc)))
