"""Commands of `python -m perf`: entry points, which read configs and wire the modules of `perf` together.

Nothing but the frame in perf/command.py imports them, and that by name.
"""
