"""Streams, memory and products of the stand-in for CuPy (fake_cupy.py)."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque

import numpy as np

# Streams


class Stream:
    """Work in order. `done` and `given` count; waiting for a point is running everything before it."""

    def __init__(self, owner, non_blocking=False, ptr=None):
        self._owner, self.non_blocking = owner, non_blocking
        self.ptr = next(owner.numbers) if ptr is None else ptr
        self._queue, self._done, self._given = deque(), 0, 0
        owner.streams[self.ptr] = self

    def give(self, work, after=()):
        """Put work at the end; `after` are the points (stream, count) it waits for."""
        null = self._owner.streams.get(0)
        if self is null:
            others = [s for s in self._owner.streams.values() if s is not self and not s.non_blocking]
            after = [*after, *(s.point for s in others)]
        elif not self.non_blocking and null is not None:
            after = [*after, (null, null._given)]
        with self._owner.lock:
            self._queue.append((work, after))
            self._given += 1
        if not self._owner.lazy:
            self.synchronize()

    def run_until(self, count):
        with self._owner.lock:
            while self._done < count:
                if self._owner.interleave(self):
                    continue
                work, after = self._queue.popleft()
                self._done += 1
                self._owner.running += 1
                try:
                    for stream, point in after:
                        stream.run_until(point)
                    work()
                finally:
                    self._owner.running -= 1

    @property
    def waiting(self):
        """Pieces of work that are not done."""
        return self._given - self._done

    def synchronize(self):
        self.run_until(self._given)
        if not any(s._queue for s in self._owner.streams.values()):
            self._owner.graveyard.clear()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.give(lambda: None, [event.point] if event.point else [])

    @property
    def point(self):
        return self, self._given

    def __enter__(self):
        self._owner.current.append(self)
        return self

    def __exit__(self, *others):
        assert self._owner.current.pop() is self


class Event:
    def __init__(self, owner=None):
        self._owner, self.point = owner, None

    def record(self, stream=None):
        self.point = (stream or self._owner.current[-1]).point

    def synchronize(self):
        if self.point:
            stream, count = self.point
            stream.run_until(count)


# Memory


class Memory:
    """Bytes of a device. They are given back when the last array on them goes, but stay until queued work is done."""

    def __init__(self, owner, device, size):
        self.device, self.size = device, size
        self.bytes = np.full(max(size, 1), 0xFF, np.uint8)
        if owner.used[device] + size > owner.memory:
            raise owner.OutOfMemoryError(f"{size} bytes asked for, {owner.memory - owner.used[device]} free")
        owner.used[device] += size
        owner.most_used[device] = max(owner.most_used[device], owner.used[device])
        weakref.finalize(self, Memory._free, owner, device, size, self.bytes)

    @staticmethod
    def _free(owner, device, size, data):
        owner.used[device] -= size
        owner.graveyard.append(data)


# Products


def _matrix(address, dtype, rows, columns, ld):
    """A column-major matrix at an address."""
    assert ld >= max(rows, 1)
    count = ld * (columns - 1) + rows
    flat = np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address), dtype, count)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (flat.itemsize, ld * flat.itemsize))


def _tensor_core(x):
    """TF32: ten bits of the significand."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def gemm(owner, dtype, stacked, handle, op_a, op_b, m, n, k, alpha, *operands):
    """a, lda, b, ldb, beta, c, ldc; `stacked`: with distances of matrices behind lda, ldb, ldc, then their number."""
    assert handle == owner.handle(), "a handle of another device"
    assert {op_a, op_b} <= {0, 1}
    if stacked:
        a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c, count = operands
    else:
        (a, lda, b, ldb, beta, c, ldc), step_a, step_b, step_c, count = operands, 0, 0, 0, 1
    # the scalars are host memory, read when the call is made
    alpha, beta = (np.ctypeslib.as_array((ctypes.c_char * 8).from_address(p)).view(dtype)[0] for p in (alpha, beta))
    low, item = dtype == np.float32 and owner.math_modes[handle] == 3, np.dtype(dtype).itemsize

    def work():
        for i in range(count):
            left = _matrix(a + i * step_a * item, dtype, *((k, m) if op_a else (m, k)), lda)
            right = _matrix(b + i * step_b * item, dtype, *((n, k) if op_b else (k, n)), ldb)
            left, right = (x.T if op else x for x, op in ((left, op_a), (right, op_b)))
            if low:
                left, right = _tensor_core(np.array(left)), _tensor_core(np.array(right))
            out = _matrix(c + i * step_c * item, dtype, m, n, ldc)
            with np.errstate(all="ignore"):
                out[...] = alpha * (left @ right) + (beta * out if beta else 0)

    owner.give(work)
