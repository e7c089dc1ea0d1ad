"""Runs that were made by compressing another one."""
