"""Kernels for Hopper GPUs (compute capability 9), in Gluon: copy engine, warp groups with roles, asynchronous products."""
