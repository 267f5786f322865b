"""The counter of compilations: what should stay 0 would be seen."""

import jax
import jax.numpy as jnp

from serving.compilations import CompilationCounter


def compile_something(number: float) -> None:
    """A program that nothing compiled before."""
    jax.jit(lambda x: x * number + 1)(jnp.ones(3)).block_until_ready()


def test_compilations_are_counted_from_start_to_stop():
    counter, seen = CompilationCounter(), []
    compile_something(0.125)
    assert counter.count == 0
    counter.start(lambda: seen.append(counter.count))
    compile_something(0.25)
    assert counter.count >= 1 and len(seen) == counter.count
    before = counter.count
    jnp.ones(3)
    compiled = jax.jit(lambda x: x * 0.375).lower(jnp.ones(3)).compile()
    compiled(jnp.ones(3))
    assert counter.count == before + 1
    counter.stop()
    compile_something(0.5)
    assert counter.count == before + 1
