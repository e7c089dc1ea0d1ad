"""Analysis of runs: what they left behind, whether it is whole, and how two of them differ."""
