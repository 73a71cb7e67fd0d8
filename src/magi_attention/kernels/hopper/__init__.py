"""Warp-specialised Gluon kernels for Hopper (sm_90)."""
