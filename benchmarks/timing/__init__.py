"""Clocks, peaks of memory, and the speeds of the machine."""
