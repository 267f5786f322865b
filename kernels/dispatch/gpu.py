"""Tokens' rows to sorted places, and the gradients of their weighted sums, on Hopper.

A block of threads takes every P-th token of P blocks. Rows are read once for a token and written at its places, where
XLA gathers: it writes the places in order, and reads a token's row again for each of them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.dispatch.tiles import choose_tiles
from kernels.hopper_rows import Rows
from kernels.row_tiles import LINE, Tiles


# A jit of its own each, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def expand(x, place_M, *, tiles: Tiles | None = None, interpret=None):
    """Each row of x [N, D] at its A places, [M, D]: `place_M` has those of token n from n · A on.

    `tiles`: None for the choice of `choose_tiles`. `interpret`: parameters of Pallas's interpreter, of tests.
    """
    (num_tokens, width), num_places = x.shape, place_M.size
    per_token = num_places // num_tokens
    tiles = choose_tiles(num_tokens, width, 1) if tiles is None else tiles
    kernel = Rows(width, num_tokens, tiles)

    def body(place_ref, x_ref, out_ref, ring, arrived):
        def compute(token, buffers, carry, released):
            places = [place_ref[token * per_token + i] for i in range(per_token)]
            pieces = kernel.read(buffers[0])
            if tiles.in_registers:
                released()
            for lines, piece in zip(kernel.lines, pieces, strict=True):
                narrow = piece().astype(out_ref.dtype)
                for place in places:
                    out_ref[place, lines] = narrow
            if not tiles.in_registers:
                released()
            return carry

        kernel.walk((x_ref,), ring, arrived, compute, ())

    outs = [jax.ShapeDtypeStruct((num_places, width // LINE, LINE), x.dtype)]
    (out,) = kernel.call(body, [place_M], [kernel.lined(x)], outs, "dispatch", interpret)
    return out.reshape(num_places, width)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def combine_gradients(dy, y, weights_NA, place_M, *, tiles: Tiles | None = None, interpret=None):
    """(dy_rows [M, D], dweights [N, A]) of the sums that `combine` makes of y [M, D]; `dy` [N, D] are the sums'
    gradients, in y's dtype, weights and their gradients float32; other arguments as of `expand`."""
    (num_tokens, width), per_token = dy.shape, weights_NA.shape[1]
    tiles = choose_tiles(num_tokens, width, 1 + per_token) if tiles is None else tiles
    kernel = Rows(width, num_tokens, tiles)

    def body(weights_ref, place_ref, *refs):
        inputs, (dy_rows_ref, d_weights_ref, ring, arrived) = refs[:-4], refs[-4:]

        def place(token, i):
            return token if i == 0 else place_ref[token * per_token + i - 1]

        def compute(token, buffers, carry, released):
            own = [token * per_token + i for i in range(per_token)]
            places, weights = [place_ref[i] for i in own], [weights_ref[i] for i in own]
            dy, *rows = [kernel.read(buffer) for buffer in buffers]
            if tiles.in_registers:
                released()
            products = [kernel.zero() for _ in own]
            for i, lines in enumerate(kernel.lines):
                piece = dy[i]()
                for j, (to, weight) in enumerate(zip(places, weights, strict=True)):
                    products[j] = products[j] + piece * rows[j][i]()
                    dy_rows_ref[to, lines] = (piece * weight).astype(dy_rows_ref.dtype)
            for i, product in zip(own, products, strict=True):
                d_weights_ref[i] = jnp.sum(product)
            if not tiles.in_registers:
                released()
            return carry

        kernel.walk(inputs, ring, arrived, compute, (), place)

    outs = [
        jax.ShapeDtypeStruct((y.shape[0], width // LINE, LINE), y.dtype),
        jax.ShapeDtypeStruct((num_tokens * per_token,), jnp.float32),
    ]
    rows = [kernel.lined(dy), *[kernel.lined(y)] * per_token]
    given = [weights_NA.reshape(-1), place_M]
    dy_rows, d_weights = kernel.call(body, given, rows, outs, "combine_gradient", interpret)
    return dy_rows.reshape(y.shape), d_weights.reshape(weights_NA.shape)
