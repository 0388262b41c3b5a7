"""Neural tangent kernels of infinitely wide networks, fast and exact to rounding."""
