// Planes of positions of pairs of images on a device (the twin of ../cpu/conv_planes.h).
//
//   plane     a number for every position of the first image, whose partner in the second is shifted cyclically by (y, x);
//             flatten kernels have the shift (0, 0) only
//   unit      `run` planes of a pair, one after the other, by a group of threads: a block if images are large, else a block
//             has several groups
//   strip     positions of a thread: rows of one column, neighbours in registers; more than one strip if there are more
//             strips than threads
//   memory    every plane twice, a layer reads one and writes the other: one barrier a layer. Shared memory where that is
//             large enough, else job.planes (the host decides, _cuda/conv.py)
//   sums      a thread adds up its positions in double, the group its threads, conv_results.cu the units of a pair, always
//             in the same order: results do not depend on the launch
#pragma once
#include "../math/conv.h"
#include "general.cuh"

namespace ntk {

extern __shared__ __align__(16) unsigned char ntk_shared[];

constexpr int kConvThreads = 256;
constexpr int kTotals = 3;  // T + S, S, own term of the last layer
constexpr int kLost = kTotals, kParts = kTotals + 1;  // of a unit: its totals, then the planes that lost digits, a bit each

// Images of one side of a tile.
struct ConvSide {
    const void* x;  // (n, channels, height * width)
    void* numbers;  // (n, n_layers, layer_size), see conv_images.cuh
};

// Packed by python/ntkfast/_cuda/layout.py.
struct ConvJob {
    const GeneralLayer* layers;
    const HermiteTable* tables;
    void* fast;           // (n_layers,) ConvLayer<T>
    ConvSide i, j;
    void* planes;         // (blocks, 2 * planes, positions) if they are not in shared memory, else null
    double* parts;        // (pairs, chunks, kParts)
    double* own;          // layer_grams: (blocks * groups, n_layers, 2, positions), else null
    double* slices;       // (pairs, n_layers)
    i64 first;            // first pair of a batch, in the order of conv_pair
    i64 layer_size;       // numbers of one layer of one image
    int n_layers, height, width, channels, reach_y, reach_x, circular, pooled;
    int rows, cols;       // images of the tile
    int square_rows, square_cols;  // pairs come square by square: their images stay in the cache
    int triangle;         // both sides are the same images: only pairs i <= j
    int paired;           // only pairs i = j
    int chunks, run;      // units of a pair, planes of a unit (at most 32)
    int pairs;            // of the batch
    int first_unit, last_unit;  // units of the batch that this launch does
    int groups;           // of a block
    int n_outputs;
    int watched;          // planes that lose digits in the first layer are left to gram_conv_exact.cu
    Output outputs[kOutputs];
    Slices grams;         // of layer_grams
};

// A layer of the fast path in the type of the arithmetic.
template <class T>
struct ConvLayer {
    double after;  // unit of the state after the layer
    FastLayer<T> numbers;
    T trained;
    int scaled;
};

struct ConvPair {
    int i, j;
    bool wanted;
};
// Pair number p of a tile; of a symmetric one, rows of squares k and across - 1 - k have across + 1 squares together.
__device__ __forceinline__ ConvPair conv_pair(const ConvJob& job, i64 p) {
    if (job.paired) return {int(p), int(p), p < job.rows};
    const int each = job.square_rows * job.square_cols, inside = int(p % each);
    const i64 square = p / each;
    const int across = (job.cols + job.square_cols - 1) / job.square_cols, line = across + (job.triangle ? 1 : 0);
    int a = int(square / line), b = int(square % line);
    if (job.triangle) {
        const bool folded = b >= across - a;
        b = folded ? b - (across - a) : b;
        a = folded ? across - 1 - a : a;
        b += a;
    }
    const int i = a * job.square_rows + inside / job.square_cols, j = b * job.square_cols + inside % job.square_cols;
    return {i, j, i < job.rows && j < job.cols && (!job.triangle || i <= j)};
}

struct ConvShift {
    int y, x;
};

// Rows row .. row + rows - 1 of one column.
struct Strip {
    int row, column, rows;
};
template <int ROWS>
__device__ __forceinline__ int strips_of(const ConvJob& job) {
    return (job.height + ROWS - 1) / ROWS * job.width;
}
template <int ROWS>
__device__ __forceinline__ Strip strip_of(const ConvJob& job, int index) {
    const int row = index / job.width * ROWS;
    return {row, index % job.width, job.height - row < ROWS ? job.height - row : ROWS};
}

// Row or column of the second image.
__device__ __forceinline__ int partner(int at, int shift, int n) { return at + shift < n ? at + shift : at + shift - n; }
__device__ __forceinline__ int cyclic(int at, int n) {
    at %= n;
    return at < 0 ? at + n : at;
}
__device__ __forceinline__ bool inside(int at, int n) { return at >= 0 && at < n; }

// Half variances of two images before a layer: what a window sees in place of E and F where a slot lies in one image only.
template <class T>
struct ConvHalves {
    const T *i, *j;          // (positions,)
    const T *sum_i, *sum_j;  // summed over the columns of the window
};

// Window sums around one position of any window; the first `filled` planes take half variances.
template <int PLANES, class T>
__device__ __forceinline__ void any_window(const ConvJob& job, ConvShift s, int row, int column, const T* planes, int filled,
                                           const ConvHalves<T>& half, T (&sum)[PLANES]) {
    const int other_row = partner(row, s.y, job.height), other_column = partner(column, s.x, job.width);
    const int positions = job.height * job.width;
#pragma unroll
    for (int p = 0; p < PLANES; ++p) sum[p] = T(0);
    for (int dy = -job.reach_y; dy <= job.reach_y; ++dy)
        for (int dx = -job.reach_x; dx <= job.reach_x; ++dx) {
            int r = row + dy, c = column + dx;
            if (job.circular) r = cyclic(r, job.height), c = cyclic(c, job.width);
            const int r2 = other_row + dy, c2 = other_column + dx;
            const bool first = inside(r, job.height) && inside(c, job.width);
            const bool second = job.circular || (inside(r2, job.height) && inside(c2, job.width));
            if (first && second) {
#pragma unroll
                for (int p = 0; p < PLANES; ++p) sum[p] += planes[p * positions + r * job.width + c];
            } else if (first || second) {
                const T one = first ? half.i[r * job.width + c] : half.j[r2 * job.width + c2];
#pragma unroll
                for (int p = 0; p < PLANES; ++p) sum[p] += p < filled ? one : T(0);
            }
        }
}

// Head of shared memory; planes follow.
struct ConvMemory {
    double total[kTotals][kConvThreads];  // of every thread, here because it is rarely needed
    double sums[kConvThreads];
    unsigned lost[kConvThreads];  // planes of a unit that lost digits, at the first thread of its group
};

// A group of threads and what it works at.
struct ConvGroup {
    int number, lane, lanes;
    int unit;
    bool idle;    // threads that are too few for a group
    bool wanted;  // the unit exists and its pair is wanted
};

// Sum over the threads of a group, for all of them; all threads of the block call this.
__device__ __forceinline__ double group_sum(ConvMemory& memory, const ConvGroup& g, double value) {
    memory.sums[threadIdx.x] = value;
    __syncthreads();
    int step = 1;
    while (2 * step < g.lanes) step *= 2;
    for (; step > 0; step /= 2) {
        if (!g.idle && g.lane < step && g.lane + step < g.lanes) memory.sums[threadIdx.x] += memory.sums[threadIdx.x + step];
        __syncthreads();
    }
    const double sum = memory.sums[threadIdx.x - g.lane];
    __syncthreads();
    return sum;
}

// All layers of the units of a block. Path: a kind of number, kRows of a strip, kPlanes; start, layer, finish. `layer` says
// whether it lost digits: that plane goes no further, and its bit is left in job.parts. AGAIN: those planes only, added to the totals.
template <class Path, bool SHARED, bool AGAIN = false>
__device__ __forceinline__ void conv_tile(const ConvJob& job) {
    using T = typename Path::Number;
    ConvMemory& memory = *reinterpret_cast<ConvMemory*>(ntk_shared);
    const int positions = job.height * job.width, size = Path::kPlanes * positions, strips = strips_of<Path::kRows>(job);
    T* planes = SHARED ? reinterpret_cast<T*>(ntk_shared + sizeof(ConvMemory))
                       : static_cast<T*>(job.planes) + i64(blockIdx.x) * job.groups * 2 * size;
    ConvGroup g;
    g.lanes = job.groups == 1 ? int(blockDim.x) : strips;
    g.number = int(threadIdx.x) / g.lanes, g.lane = int(threadIdx.x) % g.lanes;
    g.idle = g.number >= job.groups;
    planes += (g.idle ? 0 : g.number) * 2 * size;
    const Strip own = strip_of<Path::kRows>(job, g.lane);
    for (int first = job.first_unit + int(blockIdx.x) * job.groups; first < job.last_unit; first += int(gridDim.x) * job.groups) {
        g.unit = first + g.number;
        const ConvPair pair = conv_pair(job, job.first + g.unit / job.chunks);
        g.wanted = !g.idle && g.unit < job.last_unit && pair.wanted;
        if (job.groups == 1 && !g.wanted) continue;  // the same for all threads
        auto part = [&](int t) -> double& { return job.parts[i64(g.unit) * kParts + t]; };
        const unsigned todo = !AGAIN ? ~0u : g.wanted ? unsigned(part(kLost)) : 0;
        if (AGAIN && !__syncthreads_or(int(todo))) continue;
        unsigned& lost = memory.lost[threadIdx.x - g.lane];
        if (g.lane == 0) lost = 0;  // the others look behind the next barriers
        const Path path{job, memory, pair.i, pair.j};
        for (int t = 0; t < kTotals; ++t) memory.total[t][threadIdx.x] = 0.0;
        T *from = planes, *to = planes + size;
        const int plane = g.unit % job.chunks * job.run, planes_left = g.wanted ? (job.pooled ? positions : 1) - plane : 0;
#pragma unroll 1
        for (int k = 0; k < job.run; ++k) {
            bool exists = k < planes_left && todo >> k & 1;
            const ConvShift s = {(plane + k) / job.width, (plane + k) % job.width};
#pragma unroll 1
            for (int at = g.lane; exists && at < strips; at += g.lanes)
                path.start(s, at == g.lane ? own : strip_of<Path::kRows>(job, at), from);
            __syncthreads();
#pragma unroll 1
            for (int h = 0; h < job.n_layers; ++h) {
#pragma unroll 1
                for (int at = g.lane; exists && at < strips; at += g.lanes)
                    if (path.layer(h, s, at == g.lane ? own : strip_of<Path::kRows>(job, at), from, to)) atomicOr(&lost, 1u << k);
                __syncthreads();
                if (h == 0) exists = exists && !(lost >> k & 1);
                T* next = from;
                from = to, to = next;
            }
        }
        path.finish(g, from, to);
        // The layer that lost digits has added them up if it is the last one: then all planes of the unit are done again.
        const bool all = lost != 0 && job.n_layers == 1;
        for (int t = 0; t < kTotals; ++t) {
            const double sum = path.unit() * group_sum(memory, g, memory.total[t][threadIdx.x]);
            if (g.wanted && g.lane == 0) part(t) = AGAIN ? part(t) + sum : all ? 0.0 : sum;
        }
        if (!AGAIN && g.wanted && g.lane == 0) part(kLost) = all ? ~0u : lost;
    }
}

}  // namespace ntk
