"""Gram matrices in files, for results larger than memory and runs longer than a machine stays up."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ntkfast import _conv, _core
from ntkfast._arrays import as_numpy
from ntkfast._done import MatrixFile
from ntkfast._images import dense_format
from ntkfast._plan import mix_of
from ntkfast._problem import Problem
from ntkfast._tiles import fused_side
from ntkfast.convolution import ConvNetwork
from ntkfast.gram import KINDS, _check_kinds, gram
from ntkfast.network import Network

#: Of the done-map; another one is refused.
FORMAT = 1
#: Rows of a tile: its scratch is 32 MB in float64. Slow kernels take smaller tiles, of about so many seconds.
_SIDE, _SECONDS = 2048, 20.0
#: Tiles every part should have at least, if the matrix is not small: smaller ones than _FEW rows only if they take
#: more than _SHORT seconds.
_SHARE, _FEW, _SHORT = 8, 128, 1.0
#: Bytes hashed at once.
_BLOCK = 4 << 20


def gram_to_file(
    net: Network | ConvNetwork,
    X: Any,
    path: str | os.PathLike[str],
    Y: Any = None,
    *,
    get: str = "ntk",
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
    data_format: str = "channels_last",
) -> np.memmap[Any, Any]:
    """Gram matrix in a ``.npy`` file, tile by tile; called again, it resumes.

    For results larger than memory and runs longer than a machine stays up. The file has its full size from the start;
    the directory ``path + ".done"`` beside it (the done-map) says which tiles it holds. A run that was interrupted, by
    Ctrl-C, a kill or the end of the job, goes on where it stopped when the same call is made again; it loses at most
    the tile in progress and those of the last second. An interrupted and an uninterrupted run give the same bits (on
    one machine with the same settings). When the matrix is complete the done-map may be deleted.

    Parameters
    ----------
    net : Network or ConvNetwork
    X : array, shape (n, d), or images (n, *grid, channels)
        As for :func:`gram`; its dtype is that of the result.
    path : str or path
        The file. It must not exist, or be an unfinished (or finished) file of this very computation.
    Y : array, shape (m, d), or images, optional
        Other points; ``None`` means X: tiles on and above the diagonal are computed and mirrored.
    get : "ntk", "nngp" or "last_hidden"
    part : (k, of)
        Compute the share k = 0, ..., of - 1 of the tiles. All parts write into the one file ``path``, at the same time
        or one after the other, in processes of one machine or of several with a shared file system. That must keep
        writes to different bytes of a file apart, as local ones, Lustre, GPFS and CephFS do; NFS clients may not.
        ``of`` may change between runs: tiles that any part has done are not done again.
    progress : bool
        Show a progress bar with the time left (tqdm if installed).
    data_format : "channels_last" or "channels_first"
        Of images; a run may resume with the same images in the other one.

    Returns
    -------
    numpy.memmap, shape (n, m), read-only
        Complete if all parts are; ``"complete"`` in ``about.json`` of the done-map tells. Tiles of parts that are not
        done are 0.

    Raises
    ------
    FileExistsError
        ``path`` exists and has no done-map: it was not made by this function.
    FileNotFoundError, IsADirectoryError, PermissionError
        The directory of ``path`` does not exist or is not writable; ``path`` is a directory; the file was deleted and
        its done-map was not.
    OSError
        The disk has not enough room (before anything is written).
    RuntimeError
        Another process computes this part now.
    ValueError
        ``path`` belongs to another computation (the message names what differs); bad ``part``; several kinds in
        ``get``. Nothing is overwritten.
    The errors of :func:`gram`.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf, pathlib, tempfile
    >>> net, X = nf.resnet(depth=50), np.eye(4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "K.npy"
    ...     K = nf.gram_to_file(net, X, path, progress=False)
    ...     np.array_equal(np.load(path), nf.gram(net, X))
    True
    """
    kind, share = _kind(get), _part(part)
    target = _target(path)
    problem = _problem(net, X, Y, data_format)
    about = _about(problem, kind, X, Y, data_format) | {"tiling": _new_tiling(problem, kind, share[1])}
    file = MatrixFile(target, problem.shape, problem.dtype, about, share, bool(progress))
    del problem  # it may hold a copy of the points
    if not file.check():
        try:
            gram(net, X, Y, get=kind, out=file, progress=progress, data_format=data_format)
        finally:
            file.close()
        file.finish()
    return file.view()


def _kind(get: Any) -> str:
    if not isinstance(get, str):
        raise ValueError(f"gram_to_file writes one kernel into one file, got get={get!r}; use one of "
                         f"{', '.join(KINDS)}, and call it once for each, with a path of its own")  # fmt: skip
    return _check_kinds(get)[0]


def _part(part: Any) -> tuple[int, int]:
    try:
        k, of = part
        good = int(k) == k and int(of) == of and 0 <= k < of
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"part={part!r}: use (k, of), two integers with 0 <= k < of; (0, 1) is all")
    return int(k), int(of)


def _target(path: Any) -> Path:
    """The path, if a file can be there."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; gram_to_file needs the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the directory {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: the directory {target.parent} is not writable")
    return target


def _problem(net: Network | ConvNetwork, X: Any, Y: Any, data_format: str) -> Problem | _conv.Problem:
    if isinstance(net, ConvNetwork):
        return _conv.Problem(net, X, Y, None, None, data_format)
    dense_format(data_format)
    return Problem(net, X, Y, None, None)


def _about(problem: Problem | _conv.Problem, kind: str, X: Any, Y: Any, data_format: str) -> dict[str, Any]:
    """What makes two computations the same one, as it is stored."""
    from ntkfast import __version__

    return {
        "format": FORMAT,
        "ntkfast": __version__,
        "net": repr(problem.net),
        "functions": _functions(problem.net),
        "get": kind,
        "dtype": str(problem.dtype),
        "shape": list(problem.shape),
        "X": _digest(problem, X, "X", data_format),
        "Y": None if Y is None else _digest(problem, Y, "Y", data_format),
    }


def _functions(net: Network | ConvNetwork) -> list[Any]:
    """Values of the activations that are the user's functions: their repr is only a name."""
    used = dict.fromkeys(getattr(layer, "activation", None) for layer in net.layers)
    at = np.linspace(-3.1, 3.3, 9)
    # Six digits: libraries of mathematical functions differ in the last ones.
    return [
        [s.name, *(f"{v:.6g}" for v in np.asarray(s.function(at))), repr(s.tolerance)]
        for s in used
        if s is not None and s.function is not None
    ]


def _digest(problem: Problem | _conv.Problem, points: Any, name: str, data_format: str) -> dict[str, Any]:
    """Shape and hash of the points in the dtype of the computation, channels last."""
    gpu = problem.gpu
    array = (gpu.view if gpu is not None and gpu.resident else as_numpy)(points, name)[0]
    if data_format == "channels_first":
        array = np.moveaxis(array, 1, -1)
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, _BLOCK // max(1, problem.dtype.itemsize * int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), step):
        rows = array[start : start + step]
        digest.update(np.ascontiguousarray(rows.get() if hasattr(rows, "get") else rows, problem.dtype).data)
    return {"shape": list(array.shape), "blake2b": digest.hexdigest()}


def _new_tiling(problem: Problem | _conv.Problem, kind: str, parts: int) -> dict[str, int]:
    """Rows of a tile, and the unit they begin at."""
    (n, m), side, unit = problem.shape, _SIDE, 1
    if isinstance(problem, Problem):
        nanoseconds = problem.nanoseconds(problem.path([mix_of(problem.net, kind)]))
        side = min(side, fused_side(int(np.prod(problem.x.rows.shape[1:])), nanoseconds))
        unit = _core.PANEL
    else:
        nanoseconds = problem.nanoseconds()

    def seconds() -> float:
        return 1e-9 * nanoseconds * side * side

    while side > 8 and seconds() > _SECONDS:
        side //= 2
    while (side > _FEW or (side > 8 and seconds() > _SHORT)) and n * m < _SHARE * parts * side * side:
        side //= 2
    return {"side": side, "unit": unit}
