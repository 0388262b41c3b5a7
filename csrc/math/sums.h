// Sums of squares as if in twice the precision (Ogita, Rump, Oishi 2005): every rounding error is kept beside the sum.
// Compile without contraction.
#pragma once
#include "portable.h"

namespace ntk {

// sum + low += other
NTK_INLINE void add_twofold(double& sum, double& low, double other, double other_low) {
    double s = sum + other, b = s - sum;
    low += ((sum - (s - b)) + (other - b)) + other_low;
    sum = s;
}
NTK_INLINE void add_square(double& sum, double& low, double v) {
    double p = v * v;
    add_twofold(sum, low, p, fma_(v, v, -p));
}

}  // namespace ntk
