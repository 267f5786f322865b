"""Counts compilations, so that serving can show that there are none."""

from __future__ import annotations

from collections.abc import Callable

import jax

# Recorded by JAX around each call of XLA's compiler, a hit in the persistent cache included.
EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Compilations of this process since `start`. JAX keeps a listener for good, so there is one per engine."""

    def __init__(self) -> None:
        self.count = 0
        self._on_compile: Callable[[], None] | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def start(self, on_compile: Callable[[], None]) -> None:
        """Counts from now on, and calls `on_compile` at each."""
        self.count, self._on_compile = 0, on_compile

    def stop(self) -> None:
        self._on_compile = None

    def _listen(self, event: str, seconds: float, **more: object) -> None:
        if event == EVENT and self._on_compile is not None:
            self.count += 1
            self._on_compile()
