"""A run's process and its surroundings: signals, printed text, a terminal that may go away."""
