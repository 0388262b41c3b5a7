"""Kernels times columns: K V without K, and the same as a linear operator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._arrays import as_numpy, check_memory
from ntkfast._plan import mix_of
from ntkfast._problem import Problem, factors
from ntkfast._tiles import Progress, Tiles, fused_side
from ntkfast.gram import _check_kinds
from ntkfast.network import Network

Array = NDArray[Any]
Vector = NDArray[np.float64]

#: Columns of V of one pass: a thread keeps (columns, 2 x 4096) sums, 32 MB.
_COLUMNS = 512


def _one_kind(get: Any) -> str:
    if not isinstance(get, str):
        raise ValueError(f"a product takes one kind, got get={get!r}")
    return _check_kinds(get)[0]


def _columns(V: Any, rows: int) -> Array:
    """V, (rows,) or (rows, c), checked."""
    view = as_numpy(V, "V")[0]
    if view.ndim not in (1, 2):
        raise ValueError(f"V must have shape ({rows},) or ({rows}, c), got {view.shape}")
    if view.dtype.kind not in "biuf":
        raise TypeError(f"V has dtype {view.dtype}; real numbers are needed")
    if len(view) != rows:
        raise ValueError(f"V has {len(view)} rows, the kernel has {rows} columns")
    bad = np.flatnonzero(~np.isfinite(view.reshape(rows, -1)).all(axis=1))
    if len(bad):
        raise ValueError(f"V must be finite: row {bad[0]} holds NaN or infinity")
    return view


class Multiplier:
    """A kernel matrix that is never stored: what every product with it needs is made once."""

    def __init__(self, problem: Problem, kind: str, normalize: bool) -> None:
        p = self.problem = problem
        self.mix = mix_of(p.net, kind)
        path = p.path([self.mix])
        self.table = path.tables[0] if path.tables else None
        self.left = factors(p, kind, self.mix, p.x, "X", normalize, self.table)
        self.right = self.left if p.symmetric else factors(p, kind, self.mix, p.y, "Y", normalize, self.table)
        self.nanoseconds = p.nanoseconds(path)
        self.packed = _core.Packed(p.x.rows)
        self.packed_y = self.packed if p.symmetric else _core.Packed(p.y.rows)

    def times(self, view: Array, progress: Any = False) -> Array:
        """K times a checked V, (n,) or (n, c), rounded once to the dtype of the problem."""
        n, m = self.problem.shape
        count = 1 if view.ndim == 1 else view.shape[1]
        check_memory(8 * count * (n + m), f"the product with V, {view.shape},")
        v = np.array(view.reshape(m, count).T, dtype=np.float64, order="C")
        sums = np.zeros((count, n))
        nanoseconds = self.nanoseconds + 0.5 * min(count, _COLUMNS) / _core.threads()
        side = fused_side(self.problem.x.rows.shape[1], nanoseconds)
        todo = Tiles(n, m, self.problem.symmetric, side, _core.PANEL)
        with Progress(progress, -(-count // _COLUMNS) * sum(tile.entries for tile in todo)) as bar:
            for start in range(0, count, _COLUMNS):
                part = slice(start, min(start + _COLUMNS, count))
                for tile in todo:
                    self._add(tile.rows, tile.cols, tile.diagonal, v[part], sums[part])
                    bar.add(tile.entries)
        return sums.T.reshape(n, *view.shape[1:]).astype(self.problem.dtype)

    def _add(self, rows: slice, cols: slice, diagonal: bool, v: Vector, sums: Vector) -> None:
        """sums (c, n) += one tile times v (c, m), and its mirror image times v."""
        p, (f, h, _), (g, k, _) = self.problem, self.left, self.right
        output = (None, None, self.mix.as_list(), f[rows], g[cols], h[rows], k[cols], self.table)
        mirrored = (v[:, rows], sums[:, cols]) if p.symmetric else (None, None)
        _core.fused(p.compiled.core, self.packed, rows.start, self.packed_y, cols.start, p.wide, p.x.tile(rows),
                    p.y.tile(cols), 0 if diagonal else None, p.close, [output], None,
                    (v[:, cols], sums[:, rows], *mirrored))  # fmt: skip


def gram_matmul(
    net: Network,
    X: Any,
    V: Any,
    Y: Any = None,
    *,
    get: str = "ntk",
    normalize: bool = False,
    dtype: Any = None,
    accumulate: str | None = None,
    progress: bool = False,
) -> Any:
    """K V for the Gram matrix K of :func:`gram`, which is never stored.

    For points whose Gram matrix does not fit in memory. Beyond the inputs it takes one copy of the points, V and
    the result in float64, and at most 64 MB a thread.

    Parameters
    ----------
    net, get, normalize, dtype, accumulate, progress
        Those of :func:`gram`; one kind.
    X : array, shape (n, d)
        Points in host memory.
    V : array, shape (m,) or (m, c)
        Real and finite, of any real dtype; m = n without Y.
    Y : array, shape (m, d), optional
        Other points. ``None`` means X: every entry of K is computed once and used twice.

    Returns
    -------
    array, shape (n,) or (n, c)
        Of the kind and dtype of X. Sums are float64, in an order that depends on the threads: two calls agree to
        rounding.

    Raises
    ------
    ValueError
        V has another number of rows, more than two dimensions, or entries that are not finite; a tuple as ``get``.
    The errors of :func:`gram`, all of them before any work.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X, V = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]]), np.array([[1.0, 0.0], [-1.0, 2.0], [0.5, 1.0]])
    >>> net = nf.resnet(depth=3)
    >>> bool(np.allclose(nf.gram_matmul(net, X, V), nf.gram(net, X) @ V))
    True
    """
    kind = _one_kind(get)
    problem = Problem(net, X, Y, dtype, "cpu", accumulate)
    view = _columns(V, problem.shape[1])
    return problem.wrap(Multiplier(problem, kind, normalize).times(view, progress))


def KernelOperator(
    net: Network,
    X: Any,
    *,
    get: str = "ntk",
    ridge: float = 0.0,
    normalize: bool = False,
    dtype: Any = None,
    accumulate: str | None = None,
) -> Any:
    """K + ridge I as a ``scipy.sparse.linalg.LinearOperator``, K the Gram matrix of :func:`gram`, never stored.

    Parameters
    ----------
    net, X, get, normalize, dtype, accumulate
        Those of :func:`gram_matmul`.
    ridge : float
        Not negative.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator, shape (n, n)
        Symmetric; of the dtype of X. ``cg``, ``eigsh``, ``lobpcg`` and the others of SciPy take it. Points are checked,
        packed and their norms taken once, not with every product.

    Raises
    ------
    ImportError
        SciPy is missing.
    The errors of :func:`gram_matmul`; ValueError for a ridge that is negative or not finite.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from scipy.sparse.linalg import cg, eigsh
    >>> X = np.random.default_rng(0).normal(size=(200, 5))
    >>> K = nf.KernelOperator(nf.fully_connected(depth=3), X, ridge=0.1)
    >>> weights, failed = cg(K, X[:, 0], rtol=1e-8)  # kernel ridge regression of the first feature
    >>> failed, bool(np.allclose(K @ weights, X[:, 0], atol=1e-6))
    (0, True)
    >>> largest = eigsh(K, k=3, return_eigenvectors=False)
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise ImportError("KernelOperator is a SciPy LinearOperator and SciPy is missing: pip install scipy") from None
    if not 0.0 <= float(ridge) < np.inf:
        raise ValueError(f"ridge={ridge} must be a number that is not negative")
    one = _one_kind(get)
    problem = Problem(net, X, None, dtype, "cpu", accumulate)
    multiplier, n, kind = Multiplier(problem, one, normalize), problem.shape[0], problem.dtype

    def times(V: Any) -> Array:
        view = _columns(V, n)
        product: Array = multiplier.times(view) + view.astype(kind) * kind.type(ridge)
        return product

    return LinearOperator((n, n), matvec=times, rmatvec=times, matmat=times, rmatmat=times, dtype=kind)
