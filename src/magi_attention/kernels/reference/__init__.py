"""Plain torch: the dense definition and the blockwise CPU kernels."""
