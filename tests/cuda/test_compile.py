"""Every CUDA kernel compiles for every architecture within its budget; the cache and the sentences of compiler.py."""

from __future__ import annotations

import functools
import os
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_cupy
import pytest

import ntkfast._cuda as cuda
from ntkfast._cuda import compiler, layout, nvrtc

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))

#: Registers of a thread, on any architecture. 65536 registers of a multiprocessor hold two blocks of 256 threads with
#: 128 each, three with 80. Upper bounds, not what one version of NVRTC gives; nothing may spill. Left to itself NVRTC
#: 13 spills for sm_100 and sm_120 in order to hold more blocks: say how many are enough, __launch_bounds__(256, 2).
REGISTERS = {
    "combine_f32": 64,
    "combine_f64": 64,
    "conv_images_fast_f32": 128,
    "conv_images_fast_f64": 128,
    "conv_images_general_f64": 128,
    "conv_layers_f32": 64,
    "conv_layers_f64": 64,
    "conv_results_f32": 72,
    "conv_results_f64": 72,
    "gram_conv_exact_f32": 128,
    "gram_conv_exact_f64": 128,
    "gram_conv_exact_far_f32": 128,
    "gram_conv_exact_far_f64": 128,
    "gram_conv_far_f32": 208,
    "gram_conv_far_f64": 208,
    "gram_conv_fast_f32": 128,
    "gram_conv_fast_f64": 128,
    "gram_conv_general_f64": 128,
    "gram_conv_general_far_f64": 128,
    "gram_conv_seams_f32": 128,
    "gram_conv_seams_f64": 208,
    "gram_dense_f32": 128,
    "gram_dense_f64": 128,
    "gram_general_f32": 128,
    "gram_general_f64": 128,
    "gram_table_f32": 80,
    "gram_table_f64": 80,
    "layer_grams_f32": 128,
    "layer_grams_f64": 128,
    "layout": 32,
    "multiply_add_f32": 64,
    "multiply_add_f64": 64,
    "multiply_sum_f32": 64,
    "multiply_sum_f64": 64,
    "scale_f32": 40,
    "scale_f64": 40,
    "squares_f32": 56,
    "squares_f64": 56,
}
#: static and dynamic shared memory of a block; more needs permission by an attribute of the function
SHARED = 48 * 1024
#: (CUDA, compute capability); Volta is gone in CUDA 13
TARGETS = [(13, 90), (12, 70), (13, 75), (13, 80), (13, 86), (13, 100), (13, 120), (12, 90)]
FAST = TARGETS[:2]


@functools.cache
def find(major):
    try:
        return nvrtc.find(major)
    except cuda.CudaUnavailable:
        return None


def library(major):
    found = find(major)
    if found is None:
        pytest.skip(f"NVRTC of CUDA {major} is not installed: pip install '.[test]'")
    return found


@pytest.fixture
def newest():
    found = find(13) or find(12)
    if found is None:
        pytest.skip("NVRTC is not installed: pip install '.[test]'")
    return found


def resources(log):
    """{kernel: {registers, stack, stores, loads, shared}} from the log of ptxas."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        numbers = {
            "registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame",
            "stores": r"(\d+) bytes spill stores", "loads": r"(\d+) bytes spill loads",
        }  # fmt: skip
        found[part[: part.index("'")]] = row = {k: int(re.search(p, part).group(1)) for k, p in numbers.items()}
        shared = re.search(r"(\d+) bytes smem", part)
        row["shared"] = int(shared.group(1)) if shared else 0
    return found


def dynamic(kernel):
    """Bytes of dynamic shared memory that the host asks for."""
    name, _, suffix = kernel.rpartition("_")
    return layout.SHARED.get((name, suffix), 0)


def over_budget(log):
    """What is wrong with the kernels of a log, in words."""
    wrong = []
    for kernel, row in resources(log).items():
        if kernel not in REGISTERS:
            wrong.append(f"{kernel} has no budget: add it to REGISTERS")
        elif row["registers"] > REGISTERS[kernel]:
            wrong.append(f"{kernel} uses {row['registers']} registers, budget {REGISTERS[kernel]}")
        if row["stores"] or row["loads"] or row["stack"]:
            wrong.append(f"{kernel} spills: {row}")
        if row["shared"] + dynamic(kernel) > SHARED:
            wrong.append(f"{kernel}: {row['shared']} + {dynamic(kernel)} bytes of shared memory")
    # the one about the architecture itself is known
    wrong += [w for w in log.splitlines() if "warning" in w and "are deprecated and may be removed" not in w]
    return wrong


@functools.cache
def compiled(major, arch):
    """{file: log, or the error} for one architecture; two at a time, the compiler runs without Python's lock."""

    def log(name):
        try:
            return compiler.compile_cubin(name, str(arch), ("--ptxas-options=-v",), find(major))[1]
        except nvrtc.CompileError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(log, FILES), strict=True))


def target(major, arch):
    marks = () if (major, arch) in FAST else pytest.mark.slow
    return pytest.param(major, arch, marks=marks, id=f"cuda{major}-sm_{arch}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("major", "arch"), [target(*t) for t in TARGETS])
def test_kernels_compile_within_their_budgets(name, major, arch):
    library(major)
    log = compiled(major, arch)[name]
    if isinstance(log, Exception):
        raise log
    assert resources(log)
    assert over_budget(log) == []


def test_every_budget_has_its_kernel(newest):
    found = set()
    for name in FILES:
        text = (compiler.sources() / "cuda" / f"{name}.cu").read_text()
        expanded = newest.compile(text, name, ("-arch=compute_90", f"-I{compiler.sources()}"), "PTX")[0].decode()
        found |= set(re.findall(r"\.visible \.entry (\w+)\(", expanded))
    assert found == REGISTERS.keys()


#: 64 numbers that live at once
BUSY = """
double s[64];
for (int k = 0; k < 64; ++k) s[k] = x[k];
for (int r = 0; r < n; ++r)
    for (int k = 0; k < 64; ++k) s[k] = s[k] * s[(k + 7) % 64] + s[(k + 1) % 64];
for (int k = 0; k < 64; ++k) x[k] = s[k];
"""


def test_budgets_can_be_exceeded(newest, monkeypatch):
    def log(body, bounds=""):
        source = f'extern "C" __global__ void {bounds} gram_dense_f64(double* x, int n) {{ {body} }}'
        return newest.compile(source, "probe.cu", ("-arch=sm_90", "--ptxas-options=-v"))[1]

    assert over_budget(log("x[n] = 0;")) == []
    monkeypatch.setitem(REGISTERS, "gram_dense_f64", 40)
    (message,) = over_budget(log(BUSY))
    assert "registers, budget 40" in message
    assert "spills" in " ".join(over_budget(log(BUSY, "__launch_bounds__(1024)")))
    (message,) = over_budget(log("__shared__ double s[6000]; s[n] = n; __syncthreads(); x[n] = s[0];"))
    assert f"48000 + {dynamic('gram_dense_f64')} bytes" in message
    assert "declared but never referenced" in over_budget(log("int unused; x[n] = 0;"))[0]
    monkeypatch.delitem(REGISTERS, "gram_dense_f64")
    (message,) = over_budget(log("x[n] = 0;"))
    assert "has no budget" in message


def test_sources_travel_with_the_package():
    folder = compiler.sources() / "cuda"
    written = sorted((ROOT / "csrc" / "cuda").iterdir())
    assert [p.name for p in sorted(folder.iterdir())] == [p.name for p in written]
    for path in written:
        assert (folder / path.name).read_text() == path.read_text(), f"{path.name}: reinstall the package"


def test_planted_faults_are_cuda(newest):
    source = (ROOT / "tests" / "cuda" / "faults" / "faults.cu").read_text()
    newest.compile(source, "faults.cu", ("-arch=sm_90", *compiler.OPTIONS))


def test_arithmetic_as_ieee_754_has_it(newest):
    source = """
extern "C" __global__ void f(float* x, double* y) {
    x[3] = x[0] * x[1] + x[2];
    x[4] = x[0] / x[1];
    x[5] = sqrtf(x[0]);
    y[3] = y[0] * y[1] + y[2];
}
"""
    text = newest.compile(source, "f.cu", ("-arch=compute_90", *compiler.OPTIONS), "PTX")[0].decode()
    for instruction in ("mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32", "mul.rn.f64", "add.rn.f64"):
        assert instruction in text
    assert "fma" not in text
    assert ".ftz" not in text


# The compiler alone


def test_compiling_needs_no_cupy(newest, fresh_python):
    code = """
import sys
sys.modules["cupy"] = None
from ntkfast._cuda import compiler
data, log = compiler.compile_cubin("layout", "90")
print(data[:4], log == "")
"""
    assert fresh_python(code) == f"{bytes([127])!r} True\n".replace(r"\x7f", r"\x7fELF")


def test_errors_of_the_compiler_carry_its_log(newest):
    with pytest.raises(nvrtc.CompileError, match=r"(?s)f.cu does not compile under NVRTC \d+\.\d+ .*g.*is undefined"):
        newest.compile('extern "C" __global__ void f(int* p) { g(p); }', "f.cu", ("-arch=sm_90", *compiler.OPTIONS))
    # a function without a mark belongs to the host
    with pytest.raises(nvrtc.CompileError, match="without execution space annotations"):
        newest.compile(
            'int g() { return 1; }\nextern "C" __global__ void f(int* p) { *p = g(); }',
            "f.cu",
            ("-arch=sm_90", *compiler.OPTIONS),
        )


def test_a_device_newer_than_the_compiler_gets_ptx(newest):
    data, _ = compiler.compile_cubin("layout", "999", nvrtc=newest)
    assert f".target sm_{newest.archs[-1]}".encode() in data
    assert not data.endswith(b"\0")


def test_a_device_older_than_the_compiler():
    with pytest.raises(cuda.CudaUnavailable, match=r"this GPU has 7\.0: pip install \"ntkfast\[cuda12\]\""):
        compiler.compile_cubin("layout", "70", nvrtc=library(13))


@pytest.mark.parametrize("major", [11, 14])
def test_majors_that_are_not_supported(major):
    with pytest.raises(cuda.CudaUnavailable, match=f"CUDA {major}; ntkfast supports 12 and 13"):
        nvrtc.find.__wrapped__(major)


def test_both_majors_are_found_side_by_side():
    assert [library(m).version[0] for m in (12, 13)] == [12, 13]


@pytest.mark.parametrize("major", [None, 12, 13])
def test_no_compiler(major, monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: iter(["libnvrtc-that-is-not-there.so"]))
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    with pytest.raises(cuda.CudaUnavailable, match=rf"\(libnvrtc\) is not installed: pip install {package}$"):
        nvrtc.find.__wrapped__(major)


def test_the_compiler_of_another_major_is_refused(monkeypatch):
    library(13)
    paths = nvrtc._candidates
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: paths(major) if major == 13 else iter(()))
    with pytest.raises(cuda.CudaUnavailable, match=r"CUDA 12, but only NVRTC of CUDA 13 .* nvidia-cuda-nvrtc-cu12$"):
        nvrtc.find.__wrapped__(12)


# The cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources that may be changed, and an empty cache."""
    source = tmp_path / "src"
    (source / "cuda").mkdir(parents=True)
    (source / "math").mkdir()
    (source / "math" / "value.h").write_text("#define VALUE 1\n")
    kernel = '#include "math/value.h"\nextern "C" __global__ void f(int* p) { *p = VALUE; }\n'
    (source / "cuda" / "f.cu").write_text(kernel)
    monkeypatch.setattr(compiler, "sources", lambda: source)
    monkeypatch.setenv("NTKFAST_CACHE_DIR", str(tmp_path / "cache"))
    return source


@pytest.fixture
def count(monkeypatch):
    """The number of compilations so far."""
    calls, compile_cubin = [], compiler.compile_cubin
    monkeypatch.setattr(compiler, "compile_cubin", lambda *a: calls.append(a) or compile_cubin(*a))
    return lambda: len(calls)


def test_the_cache_is_used(newest, folder, count):
    path = compiler.cubin_file("f", "90")
    assert path.parent == folder.parent / "cache"
    assert path.suffix == ".cubin"
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert compiler.cubin_file("f", "90") == path
    assert count() == 1
    assert {p.suffix for p in path.parent.iterdir()} == {".cubin", ".sha256"}  # nothing temporary is left
    assert compiler.cubin_file("f", "999").suffix == ".ptx"


def test_everything_is_in_the_key(newest, folder, count):
    paths = [compiler.cubin_file("f", "90")]

    def new(*arguments):
        paths.append(compiler.cubin_file(*arguments))
        assert len(set(paths)) == len(paths) == count()

    (folder / "math" / "value.h").write_text("#define VALUE 2\n")
    new("f", "90")
    (folder / "math" / "value.h").rename(folder / "math" / "other.h")
    (folder / "cuda" / "f.cu").write_text((folder / "cuda" / "f.cu").read_text().replace("value.h", "other.h"))
    new("f", "90")
    new("f", "80")
    new("f", "90", ("-lineinfo",))
    (folder / "cuda" / "g.cu").write_text((folder / "cuda" / "f.cu").read_text())
    new("f", "90")
    new("g", "90")
    others = [m for m in (12, 13) if find(m) and find(m).version != newest.version]
    if others:
        new("g", "90", (), find(others[0]))


@pytest.mark.parametrize("damage", ["other bytes", "cut", "no checksum", "rubbish checksum", "folder"])
def test_a_damaged_cache_is_mended(newest, folder, count, damage):
    path = compiler.cubin_file("f", "90")
    good, checksum = path.read_bytes(), path.with_suffix(".sha256")
    if damage == "other bytes":
        path.write_bytes(good[:100] + b"?" + good[101:])
    elif damage == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "no checksum":
        checksum.unlink()
    elif damage == "rubbish checksum":
        checksum.write_bytes(b"\xff\xfe")
    else:  # not a file at all: it cannot be replaced
        path.unlink()
        path.mkdir()
    again = compiler.cubin_file("f", "90")
    assert count() == 2
    assert again.read_bytes() == good
    assert (again == path) == (damage != "folder")


def test_a_cache_that_cannot_be_written(newest, folder, count, monkeypatch):
    (folder.parent / "file").write_text("in the way")
    monkeypatch.setenv("NTKFAST_CACHE_DIR", str(folder.parent / "file" / "cache"))
    path = compiler.cubin_file("f", "90")
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert folder.parent not in path.parents


def test_a_writer_that_stops_half_way_leaves_nothing(newest, folder, monkeypatch):
    def fail(*others):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        compiler.cubin_file("f", "90")
    assert list((folder.parent / "cache").iterdir()) == []


def test_many_writers_at_once(newest, folder):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: compiler.cubin_file("f", "90"), range(16)))
    assert len(set(paths)) == 1
    assert compiler._read(paths[0]) is not None
    assert len(list(paths[0].parent.iterdir())) == 2


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home-of-user")
    monkeypatch.delenv("NTKFAST_CACHE_DIR", raising=False)
    for value, wanted in (
        ("/cache", "/cache/ntkfast"),
        ("", "/home-of-user/.cache/ntkfast"),
        ("relative", "/home-of-user/.cache/ntkfast"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert compiler.cache_folder() == Path(wanted)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path("/home-of-user/.cache/ntkfast")
    monkeypatch.setenv("NTKFAST_CACHE_DIR", "~/own")
    assert compiler.cache_folder() == Path("/home-of-user/own")


# What is missing, in one sentence


def unavailable():
    with pytest.raises(cuda.CudaUnavailable) as caught:
        cuda.load_cupy()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = unavailable()
    assert "needs CuPy, which is not installed" in message
    assert "ntkfast[cuda13]" in message
    assert "ntkfast[cuda12]" in message


def runtime(monkeypatch, driver=13000, built=13000, devices=1, **modules):
    class CUDARuntimeError(RuntimeError):
        pass

    def count():
        if devices is None:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return devices

    fake = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: driver,
                                 runtimeGetVersion=lambda: built, getDeviceCount=count)  # fmt: skip
    module = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=fake, **modules))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupy_without_a_usable_gpu(monkeypatch):
    module = runtime(monkeypatch, cublas=None)
    assert cuda.load_cupy() is module
    runtime(monkeypatch, driver=0)
    assert "no NVIDIA driver is loaded" in unavailable()
    runtime(monkeypatch, driver=12080)
    message = unavailable()
    assert "driver supports CUDA 12, but this CuPy is built for CUDA 13" in message
    assert "ntkfast[cuda12]" in message
    runtime(monkeypatch, devices=0)
    assert "CUDA_VISIBLE_DEVICES" in unavailable()
    runtime(monkeypatch, devices=None)
    assert "cudaErrorNoDevice" in unavailable()


def test_cupy_without_cublas(monkeypatch):
    class Lazy(types.SimpleNamespace):
        def __getattr__(self, name):
            raise ImportError("Failure finding libcublasLt.so.13")

    module = runtime(monkeypatch)
    module.cuda = Lazy(runtime=module.cuda.runtime)
    message = unavailable()
    assert "does not find cuBLAS" in message
    assert "ntkfast[cuda13]" in message


def test_a_module_is_loaded_once_per_device(monkeypatch):
    cupy = fake_cupy.install(monkeypatch, devices=2)
    first = compiler.load("layout")
    assert compiler.load("layout") is first
    with cupy.cuda.Device(1):
        assert compiler.load("layout") is not first


def test_the_compiler_is_that_of_cupy(monkeypatch, folder):
    """CuPy of CUDA 12 gets binaries of NVRTC 12, whatever else is installed."""
    old = library(12)
    find_any, used = nvrtc.find, []
    cupy = fake_cupy.install(monkeypatch)
    cupy.cuda.runtime.runtimeGetVersion = lambda: 12090
    monkeypatch.setattr(compiler, "find", find_any)
    monkeypatch.setattr(compiler, "cubin_file", lambda name, arch, options, nvrtc: used.append(nvrtc) or folder)
    cupy.RawModule = lambda path: path
    assert compiler.load("f") == str(folder)
    assert used == [old]


def test_only_this_package_knows_cupy():
    package = ROOT / "python" / "ntkfast"
    knows = {p.parent.name for p in package.rglob("*.py") if re.search(r"^\s*(import|from) cupy", p.read_text(), re.M)}
    assert knows <= {"_cuda"}
