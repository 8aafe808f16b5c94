"""Triton kernels: @triton.jit functions only, no torch, no config lookup, no dispatch."""
