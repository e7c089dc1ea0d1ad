"""Schedules that libtpu writes for hand-written kernels, and the seconds that they take.

`dump` asks libtpu for the schedules and finds them, `bundles` parses one, and `kernels` counts how
often each part of it runs.
"""
