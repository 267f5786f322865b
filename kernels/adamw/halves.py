"""A float32 as two numbers of 16 bits: the bfloat16 that products read, and the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_HALF = 0x8000
_NAN = 0x7FC00000


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rounded, rest) of float32 `x`, bfloat16 and int16 of its shape: what `join` makes `x` of again, bit for bit.

    `rounded` is the nearest bfloat16; of two as near, the one away from zero. (To the even one, rests from -2¹⁵ to 2¹⁵
    would be needed, one more than int16 has.) A NaN becomes the NaN 0x7fc00000: others would round to an infinity or to
    zero, and products would not show them.
    """
    return from_bits(lax.bitcast_convert_type(x, jnp.int32), x != x)


def from_bits(bits: jax.Array, is_nan: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`split` of a float32 by its bits, int32."""
    bits = jnp.where(is_nan, jnp.int32(_NAN), bits)
    # Past the largest int32 the sum comes to NaNs alone, and those are gone.
    upper = lax.shift_right_arithmetic(bits + jnp.int32(_HALF), jnp.int32(16))
    return lax.bitcast_convert_type(upper.astype(jnp.int16), jnp.bfloat16), bits.astype(jnp.int16)


def join(rounded: jax.Array, rest: jax.Array) -> jax.Array:
    """The float32 of which `split` made these."""
    upper = lax.bitcast_convert_type(rounded.astype(jnp.float32), jnp.int32)
    return lax.bitcast_convert_type(upper + rest.astype(jnp.int32), jnp.float32)
