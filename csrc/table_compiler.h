// Compiles the kernel of a network into a table, where it is a function of one angle: layers without biases and with
// positively homogeneous activations, or points of equal norm.
#pragma once
#include "cpu/kernels.h"

namespace ntk {

// What is compiled: theta Theta + cov S + mean b_i b_j + last G (see Output) of points of norm `norm`.
struct TableTask {
    double theta, cov, mean, last;
    double norm;  // of all points; 1 for a plan without suffix
};

// error: the largest found between the nodes, in the arithmetic of the table, relative to |f|, or to max |f| / 10 where
// |f| is smaller. The table is good if reached.
struct TableReport {
    double error;
    bool reached;
    int panels;
};

// Throws std::bad_alloc.
template <class T>
TableReport compile_table(const Plan& plan, const TableTask& task, Table<T>& table);

extern template TableReport compile_table<double>(const Plan&, const TableTask&, Table<double>&);
extern template TableReport compile_table<float>(const Plan&, const TableTask&, Table<float>&);

}  // namespace ntk
