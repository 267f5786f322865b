"""Text from the model being trained: one full forward pass per token, to look at and not to serve."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from data import Tokenizer
from training.config import SampleConfig, TrainRun
from training.resolve import Resolved
from training.state import TrainState
from training.step import StepSpec


def sample_text(resolved: Resolved, state: TrainState, tokenizer: Tokenizer) -> str:
    """The prompt and up to `sample.tokens` tokens after it, ending early with the document."""
    config = resolved.run.sample
    length = resolved.run.data.sequence_length
    prompt = encode_prompt(resolved.run, tokenizer)
    next_token = jax.jit(_next_token, static_argnames=("spec", "config"))
    # Every device works on the same row: one row does not divide over a mesh.
    spec = dataclasses.replace(
        resolved.spec, execution=dataclasses.replace(resolved.spec.execution, placement=None, remat="none")
    )
    weights = state.weights
    tokens = np.full((1, length), tokenizer.end_id, np.int32)
    tokens[0, : len(prompt)] = prompt
    for count in range(len(prompt), len(prompt) + config.tokens):
        key = jax.random.fold_in(jax.random.key(resolved.run.seed), count)
        token = int(next_token(weights, state.biases, tokens, count - 1, key, spec=spec, config=config))
        if token == tokenizer.end_id:
            break
        tokens[0, count] = token
        prompt.append(token)
    return tokenizer.decode(prompt[1:])


def encode_prompt(run: TrainRun, tokenizer: Tokenizer) -> list[int]:
    """The start of a document and the prompt. Raises ValueError if the sample does not fit into a row: call it once
    before training too, or the error comes hours late."""
    prompt = [tokenizer.end_id, *tokenizer.encode(run.sample.prompt).tolist()]
    if len(prompt) + run.sample.tokens > run.data.sequence_length:
        raise ValueError(
            f"sample.prompt of {len(prompt)} tokens and sample.tokens={run.sample.tokens} exceed "
            f"data.sequence_length={run.data.sequence_length}; shorten one of them"
        )
    return prompt


def _next_token(weights, biases, tokens_BT, last, key, *, spec: StepSpec, config: SampleConfig) -> jax.Array:
    """Token after index `last`, int32 scalar."""
    model = spec.definition.bind(weights, biases)
    positions_BT = jnp.arange(tokens_BT.shape[1])[None, :]
    output = model(tokens_BT, positions_BT, None, spec.execution)
    hidden_B1D = jax.lax.dynamic_slice_in_dim(output.hidden_BTD, last, 1, axis=1)
    logits_V = model.logits(hidden_B1D, spec.execution)[0, 0]
    if config.temperature == 0:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / config.temperature)
