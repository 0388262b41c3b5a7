"""Rules for the source tree that a machine can check."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import INSTRUCTION_SETS

import ntkfast as nf

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
PYTHON = [*(ROOT / "python").rglob("*.py"), *(ROOT / "python").rglob("*.pyi")]
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not all(map(shutil.which, ("nm", "objdump"))) or not sys.platform.startswith("linux"),
    reason="needs g++, nm and objdump on Linux",
)


def flags(isa):
    """The options that CMakeLists.txt gives the kernels of an instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    common = re.search(r"target_compile_options\(kernels_\$\{isa\} PRIVATE (-O3[^)]*)\)", text).group(1).split()
    standard = re.search(r"CMAKE_CXX_STANDARD (\d+)", text).group(1)
    march = [] if isa == "baseline" else [f"-march=x86-64-{isa}"]
    return [f"-std=c++{standard}", "-fPIC", "-fvisibility=hidden", "-fopenmp", f"-DNTK_ISA={isa}", *common, *march]


def compile_object(source, target, isa, csrc=CSRC):
    subprocess.run([COMPILER, *flags(isa), f"-I{csrc}", "-c", str(source), "-o", str(target)], check=True, timeout=300)
    return target


# Object files


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The kernels, compiled for every instruction set."""
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(2) as pool:
        cases = [(source, isa) for source in ("gram_dense", "gram_conv") for isa in INSTRUCTION_SETS]
        made = pool.map(lambda c: compile_object(CSRC / f"cpu/{c[0]}.cpp", folder / f"{c[0]}-{c[1]}.o", c[1]), cases)
        return dict(zip(cases, made, strict=True))


def symbols(path):
    """(letter, name) of every symbol of an object file."""
    listed = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^[0-9a-f ]{16} (\S) (.+)$", listed, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_instruction_sets_share_no_symbol(objects):
    # The linker keeps one copy of a weak symbol, and that may be the one for AVX-512.
    for (source, isa), path in objects.items():
        found = symbols(path)
        assert len(found) > (50 if source == "gram_dense" else 15)
        assert [s for s in found if s[0] in "WVuvw"] == []
        table = "table" if source == "gram_dense" else "conv"
        assert [name for letter, name in found if letter in "TDRBGC"] == [f"ntk::{isa}::{table}"]


@pytest.mark.slow
@needs_compiler
def test_kernels_call_nothing_but_threads_and_memory(objects):
    # A call of libm in a loop is the end of its vectors; erf and exp have formulas in csrc/math.
    for path in objects.values():
        outside = {name for letter, name in symbols(path) if letter == "U"}
        others = {name for name in outside if not name.startswith(("GOMP_", "omp_"))}
        assert others <= {"aligned_alloc", "free", "madvise", "memset", "memcpy", "memmove",
                          "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}  # fmt: skip


# A function for every hot loop, whatever its parameters: the templates themselves disappear into their callers.
PROBE = r"""
#include "cpu/differences.h"
#include "cpu/general.h"
#include "cpu/homogeneous.h"
#include "cpu/jacobian.h"
#include "cpu/matmul.h"
#include "cpu/nodes.h"
namespace ntk {
// The callers pass whole vectors only; the rest of a loop would hide what the loop itself became.
template <class A>
struct Whole {
    static A of(A a) { return a; }
};
template <>
struct Whole<int> {
    static int of(int n) { return n & ~15; }
};
template <class T>
struct Whole<const Chunk<T>&> {
    static Chunk<T> of(Chunk<T> c) { return c.n &= ~15, c; }
};
template <int K, auto F>
struct Probe;
template <int K, class R, class... A, R (*F)(A...)>
struct Probe<K, F> {
    __attribute__((noinline, flatten, used)) static R run(A... a) { return F(Whole<A>::of(a)...); }
};
HOT
}  // namespace ntk
"""
LOOPS = (
    [f"homogeneous_chunk<{numbers}, {T}>" for T in ("double", "float")
     for numbers in ("false, 0, false, false", "false, 1, false, false", "false, 2, false, false",
                     "true, 0, false, false", "true, 0, true, false", "true, 0, true, true")]
    + [f"expect<false, {name}>" for name in ("Homogeneous", "Erf", "Gaussian", "Exp", "Sin", "Cos", "Gelu")]
    + ["expect_uniform", "hermite_terms<true, false>", "hermite_terms<false, false>"]
    + ["correlate<false>", "general_row<false>", "node_layer<true, 0>", "node_layer<false, 2>"]
    + [f"correlate_row<{types}>" for types in ("double, double", "float, float", "double, float")]
    + ["table_line<double>", "table_line<float>"]
    + [f"{name}<{count}>" for name in ("times_rows", "times_columns") for count in (1, 4)]
    + [f"{name}<{T}>" for name in ("block_differences", "pair_difference") for T in ("double", "float")]
    + [f"{name}<{T}>" for name in ("multiply_add_row", "multiply_add_positions", "add_row")
       for T in ("double", "float")]
)  # fmt: skip
#: packed and scalar arithmetic of AVX; comparisons, blends and moves do not count
PACKED = r"v(?:f[n]?m(?:add|sub)\d+|mul|add|sub|sqrt|div)p[sd]"
SCALAR = r"v(?:f[n]?m(?:add|sub)\d+|mul|add|sub|sqrt|div)s[sd]"


def scalar_loops(folder, isa, csrc=CSRC):
    """The hot loops that are not done in whole vectors, with the reason."""
    wide, poor = {"v3": "%ymm", "v4": "%zmm"}[isa], {}
    hot = "\n".join(f"template struct Probe<{k}, &{loop}>;" for k, loop in enumerate(LOOPS))
    (folder / "probe.cpp").write_text(PROBE.replace("HOT\n", hot + "\n"))
    path = compile_object(folder / "probe.cpp", folder / f"probe_{isa}.o", isa, csrc)
    text = subprocess.run(["objdump", "-dr", "--no-show-raw-insn", str(path)], check=True, capture_output=True,
                          text=True).stdout  # fmt: skip
    # mangled names: the number of the loop stands in front
    bodies = re.findall(r"^[0-9a-f]+ <_ZN3ntk5ProbeILi(\d+)E\w+>:\n((?:.+\n)*)", text, re.MULTILINE)
    assert sorted(int(k) for k, _ in bodies) == list(range(len(LOOPS)))
    for k, body in bodies:
        loop = LOOPS[int(k)]
        packed = len(re.findall(rf"\b{PACKED}\s.*{wide}", body))
        scalar = len(re.findall(rf"\b{SCALAR}\s", body))
        calls = [
            c for c in re.findall(r"R_X86_64_(?:PLT32|GOTPCREL\w*)\s+(\w+)", body) if c not in ("memset", "memcpy")
        ]
        # Numbers of the layer and of the row are made once, by scalar instructions; so is the rest of a long row.
        short = loop.startswith(("multiply_add", "add_row"))  # one or two operations, and the rest of a row
        # 3: a correlation is two products and a difference
        least, share = (
            (1 + loop.startswith("multiply"), 0.0) if short else (3, 0.0 if loop.startswith("pair_") else 0.5)
        )
        if calls or packed < least or packed < share * scalar:
            poor[loop] = f"{packed} packed, {scalar} scalar, calls {calls}"
    return poor


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif("v4" not in INSTRUCTION_SETS, reason="x86-64 only")
@pytest.mark.parametrize("isa", ["v3", "v4"])
def test_hot_loops_are_vectorised(isa, tmp_path):
    assert scalar_loops(tmp_path, isa) == {}


SABOTAGE = {
    # case: (file, text, replacement, some of the loops that then lose their vectors)
    "square root by a function": (
        "math/portable.h", "double sqrt_(double x) { return __builtin_sqrt(x); }",
        "double sqrt_(double x) { return __builtin_sin(x); }",
        {"homogeneous_chunk<false, 0, false, false, double>", "expect<false, Homogeneous>"}),
    "an early exit": (
        "cpu/general.h", "const PairNumbers u = act.pair(",
        "if (g.w[k] > 1e300) __builtin_trap();\n    const PairNumbers u = act.pair(",
        {"expect<false, Erf>", "expect<false, Gelu>"}),
    "a sum in order": (
        "cpu/differences.h", "#pragma omp simd reduction(+ : sum)\n    for", "    for", {"pair_difference<double>"}),
    "an early exit beside the products": (
        "cpu/jacobian.h", "out[j] += p[j] * q[j];",
        "{\n            if (p[j] > T(1e30)) __builtin_trap();\n            out[j] += p[j] * q[j];\n        }",
        {"multiply_add_row<double>", "multiply_add_row<float>"}),
    "positions in order": (
        "cpu/jacobian.h", "#pragma omp simd reduction(+ : sum)\n", "", {"multiply_add_positions<double>"}),
    "a series by a function": (
        "math/hermite.h", "t.before = 1.0 - t.e;", "t.before = __builtin_cos(t.e);", {"hermite_terms<true, false>"}),
    "a difference by a function": (
        "cpu/differences.h", "double t0 = a0 - b[j]", "double t0 = __builtin_fmod(a0, b[j])",
        {"block_differences<double>"}),
}  # fmt: skip


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif("v4" not in INSTRUCTION_SETS, reason="x86-64 only")
@pytest.mark.parametrize("case", SABOTAGE)
def test_the_check_of_vectors_can_fail(case, tmp_path):
    file, text, replacement, expected = SABOTAGE[case]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = (tmp_path / "csrc" / file).read_text()
    assert source.count(text) == 1
    (tmp_path / "csrc" / file).write_text(source.replace(text, replacement))
    assert expected <= set(scalar_loops(tmp_path, "v3", tmp_path / "csrc"))


# Sources

MATH = sorted((CSRC / "math").glob("*.h"))


@needs_compiler
@pytest.mark.parametrize("header", MATH, ids=lambda p: p.name)
def test_headers_of_formulas_stand_alone(header, tmp_path):
    included = re.findall(r'^\s*#\s*include\s+([<"])(.+?)[>"]', header.read_text(), re.MULTILINE)
    assert [(mark, name) for mark, name in included if mark == "<" or name not in {p.name for p in MATH}] == []
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header.name}"\n#include "{header.name}"\nint main() {{}}\n')
    subprocess.run([COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
                    "-Wno-unused-const-variable", "-Wno-unused-variable", "-fsyntax-only", f"-I{header.parent}",
                    str(source)], check=True)  # fmt: skip


def test_headers_of_formulas_travel_with_the_package():
    folders = [Path(p) / "_src" / "math" for p in nf.__path__]
    (installed,) = [f for f in folders if f.is_dir()]
    for header in MATH:
        assert (installed / header.name).read_text() == header.read_text(), f"{header.name}: reinstall the package"


def test_only_the_bindings_know_python():
    assert len(SOURCES) >= 10
    knows = [p.name for p in SOURCES if re.search(r"pybind11|Python\.h", p.read_text())]
    assert sorted(knows) == ["arrays.h", "bindings.cpp", "holders.h"]


def test_the_reference_shares_no_code_with_the_kernels():
    for path in (ROOT / "python/ntkfast/reference").glob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import)\s+(ntkfast[\w.]*)(?:\s+import\s+(.+))?", path.read_text(), re.MULTILINE
        )
        for module, names in imported:
            assert not re.search(r"_core|_plan|_tiles|_hermite|\.gram", f"{module} {names}"), path.name


@pytest.mark.parametrize("path", [*SOURCES, *PYTHON], ids=lambda p: str(p.relative_to(ROOT)))
def test_source_files_are_short_and_know_no_machine(path):
    text = path.read_text()
    # network.py describes every layer and builder with its docstring; a list, not a program
    assert len(text.splitlines()) <= (550 if path.name == "network.py" else 450)
    assert re.findall(r"/(?:home|root|work|Users)/", text) == []
    assert "\t" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_tests_and_settings_know_no_machine():
    others = [*(ROOT / "tests").glob("*.py"), ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", ROOT / "README.md"]
    pattern = "/(?:ho" + "me|ro" + "ot|wo" + "rk)/"
    for path in others:
        if path != Path(__file__):
            assert re.findall(pattern, path.read_text()) == [], path.name


def test_one_version():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == nf.__version__
    from importlib.metadata import version

    assert version("ntkfast") == nf.__version__


# Documentation


def modules():
    yield "ntkfast"
    for found in pkgutil.walk_packages(nf.__path__, "ntkfast."):
        if found.name == "ntkfast.torch" and not importlib.util.find_spec("torch"):
            continue  # PyTorch is optional
        if not found.name.endswith(("_core", "__main__")):
            yield found.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_the_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_examples_are_found_at_all():
    finder = doctest.DocTestFinder()
    counts = {name: sum(len(t.examples) for t in finder.find(importlib.import_module(name))) for name in modules()}
    for name in ("ntkfast", "ntkfast.gram", "ntkfast.network", "ntkfast.activation", "ntkfast.reference.recursion"):
        # `gram` hides its module as an attribute, not as an import
        assert counts[name] > 2, name


@pytest.mark.parametrize("name", sorted(nf.__all__))
def test_public_names_have_a_docstring_with_an_example(name):
    item = getattr(nf, name)
    text = inspect.getdoc(item) or ""
    assert len(text) > 20
    assert not text.startswith(f"{name}(")  # made by dataclass
    if not (isinstance(item, type) and issubclass(item, Exception)):
        assert ">>> " in text


def test_public_names():
    assert sorted(nf.__all__) == list(nf.__all__)
    public = {n for n in vars(nf) if not n.startswith("_") and not inspect.ismodule(getattr(nf, n))}
    assert public == set(nf.__all__)


def readme():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = readme()
    assert blocks
    names = {"__name__": "readme"}
    for k, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {k}", "exec"), names)


# Import

HEAVY = ("scipy", "matplotlib", "tqdm", "sklearn", "torch", "pandas", "cupy", "jax", "numba")


def test_import_loads_nothing_that_is_optional(fresh_python):
    shown = fresh_python("import sys, ntkfast; print(*sorted({m.split('.')[0] for m in sys.modules}))")
    assert set(shown.split()) & set(HEAVY) == set()
    assert "numpy" in shown.split()


def test_import_is_quick(fresh_python):
    code = ("import time, numpy; t = time.process_time(); import ntkfast; print(time.process_time() - t)")  # fmt: skip
    # processor time, best of five: another process on the machine must not fail this
    assert min(float(fresh_python(code)) for _ in range(5)) < 0.3


def test_import_changes_no_global_state(fresh_python):
    code = """
import os, sys, warnings, signal, threading, numpy as np
def state():
    return (dict(os.environ), np.geterr(), np.get_printoptions(), warnings.filters[:], threading.active_count(),
            signal.getsignal(signal.SIGINT), sys.getrecursionlimit(), np.random.get_state()[2])
before = state()
import ntkfast as nf
nf.gram(nf.resnet(3, "gelu"), np.eye(3), get=("ntk", "nngp"))
after = state()
print([a == b for a, b in zip(before, after)])
"""
    assert "False" not in fresh_python(code)
