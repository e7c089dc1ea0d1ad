"""Search for the mesh, remat policy and batch that make a step fastest per token.

`candidates` lists configs and ranks them by arithmetic, `search` compiles the best of them.
"""
