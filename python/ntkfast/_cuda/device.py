"""One GPU as this package uses it: arrays without a copy, streams, products by cuBLAS, launches.

The whole CuPy surface of the package, here and in compiler.py (tests/cuda/fake_cupy.py implements exactly this; anything
new is listed first):

    ndarray         shape, dtype, ndim, size, itemsize, nbytes, strides, len(), data.ptr, device.id;
                    basic slicing (views), reshape of contiguous arrays, astype(dtype), __dlpack__, __dlpack_device__,
                    get(stream=None, out=None, blocking=True)
    empty(shape, dtype), asarray(NumPy array) (a copy on the current device), ascontiguousarray(x), from_dlpack(x)
    cuda.Device(k)  context manager, .id; cuda.Device() is the current one
    cuda.runtime    getDeviceCount(), memGetInfo() -> (free, total)
    cuda            get_current_stream(), Stream(non_blocking=True), ExternalStream(ptr): context managers, synchronize();
                    alloc_pinned_memory(bytes): has the buffer protocol; get_cublas_handle()
    cuda.cublas     sgemm, dgemm (handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc: addresses),
                    getMathMode(handle), setMathMode(handle, mode)
    kernels         compiler.py: kernel(grid, block, args, shared_mem=bytes), args: device arrays and NumPy scalars
"""
