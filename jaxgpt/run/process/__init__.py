"""A run's process and its surroundings: signals, and a terminal or pipe that may go away."""
