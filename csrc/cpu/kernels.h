// The seam between the bindings and the kernels: plain structs, one table of functions per instruction set.
#pragma once
#include <cstdint>

#include "../math/hermite.h"
#include "../math/layer.h"
#include "../math/table.h"

namespace ntk {

// A compiled network: homogeneous layers first, whose norms factor out, then any others.
struct Plan {
    const HomogeneousLayer* prefix;  // (n_prefix,)
    int n_prefix;
    double nu, beta;            // after the prefix S_ii = nu |x_i|^2 and the mean is beta |x_i|
    const GeneralLayer* suffix; // (n_suffix,)
    int n_suffix;
    const HermiteTable* tables;
};

// One result: K_ij = (theta Theta + cov S + mean b_i b_j + last G) f_i f_j + h_i h_j, G the Gram of the last inner matrix.
// Theta, S, b, G are divided by the norms and by nu if the plan has no suffix.
struct Output {
    void* data;             // (rows, stride)
    std::int64_t stride;
    void* mirror;           // K_ji is written too, at mirror + j * mirror_stride + i; null for none
    std::int64_t mirror_stride;
    double theta, cov, mean, last;
    const double *fi, *fj;  // (rows,), (cols,)
    const double *hi, *hj;  // (rows,), (cols,)
    const void* table;      // Table<T> of the sum in brackets, which then replaces the layers; null for none
};

// All slices of layer_grams: G_h,ij = own term of layer h times the factors of the later layers, times f_i f_j.
struct Slices {
    void* data;                         // (slices, rows, stride); null for none
    std::int64_t stride, slice_stride;
    void* mirror;
    std::int64_t mirror_stride;
    const double *fi, *fj;
    int readout;                        // index of the readout's slice, -1 for none
    double readout_cov, readout_const;  // its value: readout_cov S f_i f_j + readout_const
};

// Larger results go past the caches, which they would leave anyway.
constexpr double kStreamBytes = 4 << 20;

// One side of a tile.
struct Points {
    const void* x;        // (n, stride) rows, for the differences
    std::int64_t stride;
    const double* inv;    // (n,) 1 / |row as stored|, 0 for zero rows
    const double* norm;   // (n,) |x_i|
};

// A tile of inner products and what becomes of it.
struct Tile {
    const void* products;   // (rows, stride) <x_i, y_j> of the rows as stored; may be the data of an output
    std::int64_t stride;
    bool wide;              // the products are float64 although the results are float32
    std::int64_t rows, cols, dim;
    Points i, j;
    std::int64_t diagonal;  // the pair (i, j) is one point if i == j + diagonal; INT64_MIN: never
    bool stream;            // results past the caches, see write.h
    bool apart;             // no result is where its product was: its line is in no cache
    double close;           // pairs with 1 - |rho| below this get their angle from differences
    const Output* outputs;  // (n_outputs,)
    int n_outputs;
    Slices slices;
};

// Rows packed for products (product.h), in the order of the chosen instruction set; made by pack64, pack32, freed by free.
struct PackedRows {
    const void* panels;
    std::int64_t n, d;
};
constexpr std::int64_t kPanelUnit = 48;  // a tile of packed rows begins at a multiple of this

// K V of one tile K, added to sums, instead of K. All arrays (columns, stride), columns of V one after the other.
struct Matmul {
    std::int64_t columns;  // 0: K is written
    const double *vi, *vj; // V of the rows and of the columns of the tile; vi only where there is sums_j
    double *sums_i;        // += K V
    double *sums_j;        // += K^T V, of a tile of the diagonal without what is in sums_i; null: the mirror image is not wanted
    std::int64_t v_stride, sums_stride;
};

// A tile whose inner products are made on the way: rows i0 .. of x and j0 .. of y, both multiples of kPanelUnit.
struct FusedTile {
    PackedRows x, y;
    std::int64_t i0, j0;
    Tile tile;      // without products; wide: float32 rows are added up in float64
    Matmul matmul;  // then there is one output, without data
};

// Pairs one by one: the diagonal, and the door of the tests.
struct Pairs {
    std::int64_t n;
    const double *x, *s;              // (n,) 1 - |rho| and sign
    const double *norm_i, *norm_j;    // (n,)
    double* out;                      // (n,) theta Theta + cov S + mean b_i b_j + last G, no factors f
    double theta, cov, mean, last;
};

// Jacobian inner products of one layer: out_ij (+)= sum over positions l, r of P_(il)(jr) Q_(il)(jr).
struct MultiplyAdd {
    void* out;                             // (rows, stride)
    std::int64_t stride;
    const void* p;                         // (rows positions_i, p_stride)
    const void* q;                         // (rows positions_i, q_stride); null: all ones
    std::int64_t p_stride, q_stride;
    std::int64_t rows, cols;
    std::int64_t positions_i, positions_j; // 1 without q
    bool first;                            // out is set, not added to
};

// Element-wise functions of csrc/math for the tests.
enum ScalarId { kTheta0, kTheta1, kTheta2, kArea0, kArea1, kArea2, kExpId, kExpm1Id };

// Functions that need memory of their own return false if there is none.
struct Kernels {
    const char* isa;
    bool (*tile64)(const Plan&, const Tile&);
    bool (*tile32)(const Plan&, const Tile&);
    // Rows first .. last of x (n, stride), first a multiple of kPanelUnit, into panels, which are made if null. Null: no memory
    void* (*pack64)(const void* x, std::int64_t n, std::int64_t d, std::int64_t stride, std::int64_t first, std::int64_t last,
                    void* panels);
    void* (*pack32)(const void* x, std::int64_t n, std::int64_t d, std::int64_t stride, std::int64_t first, std::int64_t last,
                    void* panels);
    bool (*fused64)(const Plan&, const FusedTile&);
    bool (*fused32)(const Plan&, const FusedTile&);
    bool (*pairs64)(const Plan&, const Pairs&);
    bool (*pairs32)(const Plan&, const Pairs&);
    // as pairs64, for the compiler of tables; sums of the prefix keep their rounding errors
    bool (*nodes)(const Plan&, const Pairs&);
    // out[k] = the compiled kernel of (x[k], s[k])
    void (*table64)(const Table<double>&, std::int64_t n, const double* x, const double* s, double* out);
    void (*table32)(const Table<float>&, std::int64_t n, const float* x, const float* s, float* out);
    // out[i] = sum_k x[i,k]^2, each as if in twice the precision; largest[i] = max_k |x[i,k]|, infinity if one is not finite
    void (*squares64)(const double* x, std::int64_t n, std::int64_t d, std::int64_t stride, double* out, double* largest);
    void (*squares32)(const float* x, std::int64_t n, std::int64_t d, std::int64_t stride, double* out, double* largest);
    // one layer of the row recursion, in place; q = Q_ii
    bool (*rows)(const GeneralLayer&, const HermiteTable*, std::int64_t n, double* var, double* mean, double* q);
    void (*scalar64)(int id, std::int64_t n, const double* x, double* out);
    void (*scalar32)(int id, std::int64_t n, const float* x, float* out);
    // PairNumbers of an activation for pairs of variances a, b
    bool (*dual)(const GeneralLayer&, const HermiteTable*, std::int64_t n, const double* a, const double* b,
                 const double* x, const double* s, double* w, double* d, double* side);
    void (*multiply_add64)(const MultiplyAdd&);
    void (*multiply_add32)(const MultiplyAdd&);
    // to = from^T, (cols, rows); with `below` only what lies below the diagonal
    void (*mirror64)(const double* from, std::int64_t rows, std::int64_t cols, std::int64_t from_stride, double* to,
                     std::int64_t to_stride, bool below);
    void (*mirror32)(const float* from, std::int64_t rows, std::int64_t cols, std::int64_t from_stride, float* to,
                     std::int64_t to_stride, bool below);
};

// Inner products of rows, out[i, j] = <x_i, y_j>. Results may overwrite the rows: these are copied first.
struct Product {
    const void* x;  // (n, stride)
    std::int64_t n, d, stride;
    const void* y;  // (m, y_stride); unused if symmetric, then m = n
    std::int64_t m, y_stride;
    void* out;      // (n, out_stride)
    std::int64_t out_stride;
    bool symmetric;
    bool wide;      // float32 rows: sums in float64, rounded once
};
struct Products {
    bool (*product64)(const Product&);
    bool (*product32)(const Product&);
    // rounds of fused multiply-adds in registers on all threads; the number of operations, two each
    double (*peak64)(std::int64_t rounds);
    double (*peak32)(std::int64_t rounds);
};

const Kernels& kernels();                    // chosen once, obeys NTKFAST_ISA
const Kernels* kernels_of(const char* isa);  // null if this build or processor lacks it
const Products* products_of(const char* isa);  // the same

}  // namespace ntk
