"""NVIDIA's run-time compiler by ctypes: needs the library alone, no driver, no GPU, no CuPy."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

from ntkfast._cuda import CudaUnavailable

#: Major versions of CUDA that are known to compile the kernels; the newest is taken unless CuPy needs another.
MAJORS = (13, 12)
_WHEELS = {13: ("cu13/lib", "nvidia-cuda-nvrtc"), 12: ("cuda_nvrtc/lib", "nvidia-cuda-nvrtc-cu12")}


class CompileError(RuntimeError):
    """A kernel does not compile; the message ends with the compiler's log."""


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, path: str | Path):
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = c_char_p
        for name, types in {
            "nvrtcVersion": [POINTER(c_int), POINTER(c_int)],
            "nvrtcGetNumSupportedArchs": [POINTER(c_int)],
            "nvrtcGetSupportedArchs": [c_void_p],
            "nvrtcCreateProgram": [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p],
            "nvrtcDestroyProgram": [POINTER(c_void_p)],
            "nvrtcCompileProgram": [c_void_p, c_int, POINTER(c_char_p)],
            **{f"nvrtcGet{part}Size": [c_void_p, POINTER(c_size_t)] for part in ("ProgramLog", "CUBIN", "PTX")},
            **{f"nvrtcGet{part}": [c_void_p, c_char_p] for part in ("ProgramLog", "CUBIN", "PTX")},
        }.items():
            getattr(self._library, name).argtypes = types
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        #: (major, minor) version of CUDA
        self.version = (major.value, minor.value)
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        numbers = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        #: compute capabilities it compiles for, ascending: 75 is 7.5
        self.archs = tuple(sorted(numbers))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CompileError(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")

    def _text(self, program: c_void_p, part: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{part}Size", program, byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{part}", program, buffer)
        return buffer.raw

    def compile(self, source: str, name: str, options: Sequence[str], part: str = "CUBIN") -> tuple[bytes, str]:
        """The binary (part "CUBIN") or the assembly text ("PTX") of a source, and the compiler's log."""
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            encoded = (c_char_p * len(options))(*(o.encode() for o in options))
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            log = self._text(program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
            if status:
                message = self._library.nvrtcGetErrorString(status).decode()
                version = ".".join(map(str, self.version))
                raise CompileError(f"{name} does not compile under NVRTC {version} ({message}):\n{log}")
            data = self._text(program, part)
            return (data.rstrip(b"\0") if part == "PTX" else data), log
        finally:
            self._library.nvrtcDestroyProgram(byref(program))


def _candidates(major: int) -> Iterator[str]:
    """Where a library of this major version may be: NVIDIA's wheels, conda, a toolkit, the loader's own paths."""
    name, folder = f"libnvrtc.so.{major}", _WHEELS[major][0]
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(p) / folder for p in (wheels.submodule_search_locations or ())] if wheels else []
    roots.append(Path(sys.prefix) / "lib")
    roots += [Path(os.environ[v]) / "lib64" for v in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(v)]
    yield from (str(r / name) for r in roots if (r / name).is_file())
    yield name


@functools.cache
def find(major: int | None = None) -> Nvrtc:
    """The NVRTC library of a major version of CUDA, or the newest known one.

    Raises
    ------
    CudaUnavailable
        None is installed, or only of another major version than the one asked for.
    """
    found = []
    for wanted in (major, *(m for m in MAJORS if m != major)) if major else MAJORS:
        if wanted not in MAJORS:
            break
        for path in _candidates(wanted):
            try:
                library = Nvrtc(path)
            except OSError:
                continue
            if major is None or library.version[0] == major:
                return library
            found.append(str(library.version[0]))
            break
    if major and major not in MAJORS:
        raise CudaUnavailable(f"this CuPy is built for CUDA {major}; ntkfast supports {MAJORS[1]} and {MAJORS[0]}")
    package = _WHEELS[major or MAJORS[0]][1]
    if found:
        raise CudaUnavailable(f"this CuPy is built for CUDA {major}, but only NVRTC of CUDA {', '.join(found)} is "
                              f"installed, whose binaries it may not load: pip install {package}")  # fmt: skip
    raise CudaUnavailable(f"NVIDIA's compiler library (libnvrtc) is not installed: pip install {package}")
