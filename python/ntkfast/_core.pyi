from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_D = NDArray[np.float64]
_I = NDArray[np.int32]
_Points = tuple[NDArray[Any], _D, _D]

class Plan:
    arguments: tuple[Any, ...]
    def __init__(
        self,
        prefix: _D,
        prefix_ints: _I,
        nu: float,
        beta: float,
        suffix: _D,
        suffix_ints: _I,
        tables: list[tuple[Any, ...]],
    ) -> None: ...

class Table:
    def __init__(self, plan: Plan, mix: Sequence[float], norm: float, single: bool) -> None: ...
    @property
    def error(self) -> float: ...
    @property
    def reached(self) -> bool: ...
    @property
    def panels(self) -> int: ...
    def values(self, x: NDArray[Any], s: NDArray[Any], isa: str = "") -> NDArray[Any]: ...
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.uint8], float, int]: ...

PANEL: int

class Packed:
    def __init__(self, x: NDArray[Any]) -> None: ...

def fused(
    plan: Plan,
    x: Packed,
    i0: int,
    y: Packed,
    j0: int,
    wide: bool,
    i: _Points,
    j: _Points,
    diagonal: int | None,
    close: float,
    outputs: list[Any],
    slices: Any,
    matmul: tuple[_D, _D, _D | None, _D | None] | None = None,
) -> None: ...
def tile(
    plan: Plan,
    products: NDArray[Any],
    i: _Points,
    j: _Points,
    diagonal: int | None,
    close: float,
    outputs: list[Any],
    slices: Any,
) -> None: ...
def pairs(
    plan: Plan, x: _D, s: _D, norm_i: _D, norm_j: _D, mix: Sequence[float], single: bool = False, isa: str = ""
) -> _D: ...
def squares(x: NDArray[Any]) -> tuple[_D, _D]: ...
def product(x: NDArray[Any], y: NDArray[Any] | None, out: NDArray[Any], wide: bool = False, isa: str = "") -> None: ...
def peak(rounds: int, single: bool = False, isa: str = "") -> float: ...
def rows(plan: Plan, layer: int, var: _D, mean: _D) -> tuple[_D, _D, _D]: ...
def scalar(name: str, x: NDArray[Any], isa: str = "") -> NDArray[Any]: ...
def dual(plan: Plan, layer: int, a: _D, b: _D, x: _D, s: _D, isa: str = "") -> tuple[_D, _D, _D]: ...
def multiply_add(
    out: NDArray[Any],
    p: NDArray[Any],
    q: NDArray[Any] | None,
    positions_i: int = 1,
    positions_j: int = 1,
    first: bool = False,
    isa: str = "",
) -> None: ...

class ConvImages:
    def __init__(
        self, plan: Plan, shape: Sequence[int], fast: bool, x: NDArray[Any], twice: bool, isa: str = ""
    ) -> None: ...

def conv_tile(
    plan: Plan,
    x: ConvImages,
    i0: int,
    y: ConvImages,
    j0: int,
    triangle: bool,
    strict: bool,
    paired: bool,
    first: int,
    shifts: int,
    sums: _D,
    slices: _D | None,
) -> None: ...
def conv_bytes(plan: Plan, shape: Sequence[int], fast: bool, single: bool, twice: bool) -> int: ...
def mirror(source: NDArray[Any], target: NDArray[Any]) -> None: ...
def erf(x: Any) -> NDArray[np.float64]: ...
def isa() -> str: ...
def available() -> list[str]: ...
def threads() -> int: ...
def after_fork() -> None: ...
