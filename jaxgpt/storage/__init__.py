"""Local and remote files, decompressing streams, atomic writes and the allocator. No JAX."""
