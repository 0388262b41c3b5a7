"""Kernels of two images in 40 digits by a recursion of its own: pairs of positions, windows by coordinates."""

from __future__ import annotations

import itertools

import oracle
from mpmath import mp, mpf


def _neighbours(position, grid, window, circular):
    for offset in itertools.product(*(range(-(w // 2), w // 2 + 1) for w in window)):
        at = tuple(a + d for a, d in zip(position, offset, strict=True))
        if circular:
            yield tuple(a % n for a, n in zip(at, grid, strict=True))
        else:
            yield at if all(0 <= a < n for a, n in zip(at, grid, strict=True)) else None


def _sum(S, slots, l, r):
    return mp.fsum(S[a, b] for a, b in zip(slots[l], slots[r], strict=True) if a is not None and b is not None)


def _layer(net, layer, count):
    cw = mpf(layer.weight_variance) / (count if net.average else 1)
    if hasattr(layer, "scale"):
        return mpf(layer.skip), mpf(layer.scale), mpf(layer.scale) ** 2, cw, mpf(layer.bias_variance)
    one = mpf(1)
    gain = 1 / oracle.expectations(layer.activation, one, one, one)[0] if layer.gain is None else mpf(layer.gain)
    return mpf(0), mp.sqrt(gain), gain, cw, mpf(layer.bias_variance)


def pair(net, x, y, digits=40):
    """{"ntk", "nngp", "last_hidden"} of two images (*grid, channels)."""
    grid, pooled = x.shape[:-1], net.pooling == "gap"
    positions = list(itertools.product(*(range(n) for n in grid)))
    with mp.workdps(digits):
        slots = {l: list(_neighbours(l, grid, net.windows(len(grid)), net.padding == "circular")) for l in positions}
        count = len(slots[positions[0]])
        pairs = list(itertools.product(positions, positions)) if pooled else [(l, l) for l in positions]
        images = {"x": x, "y": y}

        def start(i, j, l, r):
            return mp.fsum(mpf(float(a)) * mpf(float(b)) for a, b in zip(images[i][l], images[j][r], strict=True))

        S = {(l, r): start("x", "y", l, r) for l, r in pairs}
        V = {i: {(l, l): start(i, i, l, l) for l in positions} for i in images}
        means = {i: dict.fromkeys(positions, mpf(0)) for i in images}
        T = dict.fromkeys(pairs, mpf(0))
        for layer in net.layers:
            p, q, r_, cw, cb = _layer(net, layer, count)
            w, act = int(layer.trained), layer.activation
            A = {i: {l: cw * _sum(V[i], slots, l, l) + cb for l in positions} for i in images}
            mu = {i: {l: oracle.mean(act, A[i][l]) for l in positions} for i in images}
            next_S, next_T, own = {}, {}, {}
            for l, r in pairs:
                C = cw * _sum(S, slots, l, r)
                a, b = A["x"][l], A["y"][r]
                Q, D = oracle.expectations(act, a, b, C + cb) if a * b > 0 else (mpf(0), mpf(0))
                own[l, r] = r_ * D * C
                next_T[l, r] = p * p * T[l, r] + r_ * D * (cw * _sum(T, slots, l, r) + w * (C + cb))
                cross = means["x"][l] * mu["y"][r] + means["y"][r] * mu["x"][l]
                next_S[l, r] = p * p * S[l, r] + p * q * cross + r_ * Q
            for i in images:
                for l in positions:
                    a = A[i][l]
                    Q = oracle.expectations(act, a, a, a)[0] if a > 0 else mpf(0)
                    V[i][l, l] = p * p * V[i][l, l] + 2 * p * q * means[i][l] * mu[i][l] + r_ * Q
                    means[i][l] = p * means[i][l] + q * mu[i][l]
            S, T = next_S, next_T
        scale = mpf(net.readout.weight_variance) / (len(positions) ** 2 if pooled else 1)
        total = {k: scale * mp.fsum(v.values()) for k, v in (("T", T), ("S", S), ("own", own))}
        return {
            "ntk": total["T"] + int(net.readout.trained) * total["S"],
            "nngp": total["S"],
            "last_hidden": total["own"],
        }
