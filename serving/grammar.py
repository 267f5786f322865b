"""Which tokens a grammar allows next (through llguidance)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from serving.tokenizer import Tokenizer

# Between the parts of a JSON value. Bounded, because a small model that is free to go on with spaces sometimes does so
# for ever; long enough for a new line indented eight levels by four.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,33}"

_NOTHING_FOLLOWS = "the grammar allows no token of the vocabulary to follow"


class GrammarError(ValueError):
    """A grammar is invalid, unsupported or too large, or a sequence has left it."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's, `end_ids` the tokens that may end a text where the grammar accepts it.

        Takes 0.2 s for SmolLM2's vocabulary. Raises ValueError without an end token, or if ids exceed `vocab_size`.
        """
        if not end_ids:
            raise ValueError("a grammar needs an end token, and the model's files name none")
        needed = max(tokenizer.vocab_size, *(i + 1 for i in end_ids))
        if needed > vocab_size:
            raise ValueError(f"the tokenizer has {needed} tokens and the model's vocabulary {vocab_size}")
        self.vocab_size = vocab_size
        self._end_ids = frozenset(end_ids)
        self._tokenizer = llguidance.LLTokenizer(
            _TokenTable(tokenizer, vocab_size, end_ids[0]),
            eos_token=list(end_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        # The first grammar builds tables of the tokenizer (0.1 s), which no request should wait for.
        self.compile_json_object()

    def compile_json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON of the schema, with free but bounded white space between its parts.

        Raises GrammarError, as do the others, for an invalid schema and for keywords of JSON Schema that llguidance
        does not enforce. What is no keyword of JSON Schema is ignored, as its specification says.
        """
        if not isinstance(schema, dict):
            raise GrammarError(f"a JSON schema is an object, not {type(schema).__name__}")
        try:
            options = {"whitespace_pattern": _WHITESPACE, "lenient": False}
            text = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise GrammarError(f"the JSON schema is invalid: {error}") from error
        return self._compile(text)

    def compile_json_object(self) -> Grammar:
        """Any JSON object."""
        return self.compile_json_schema({"type": "object"})

    def compile_regex(self, regex: str) -> Grammar:
        """Texts that match as a whole; the syntax is that of Rust's regex crate, without look-around."""
        return self._compile(llguidance.LLMatcher.grammar_from_regex(regex))

    def compile_lark(self, text: str) -> Grammar:
        """Texts of a Lark grammar in llguidance's dialect."""
        return self._compile(llguidance.LLMatcher.grammar_from_lark(text))

    def _compile(self, grammar: str) -> Grammar:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        # The lexer is built when it is first asked: what exceeds its limits shows only in a mask.
        Matcher(matcher, self).mask(np.empty(-(-self.vocab_size // 32), np.uint32))
        return Grammar(matcher, self)

    def is_end(self, token: int) -> bool:
        return token in self._end_ids


class _TokenTable:
    """What llguidance.LLTokenizer asks of a tokenizer; `is_tokenizer_wrapper` is how it knows one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self.eos_token_id = end_id
        self.bos_token_id = None
        # No bytes for the ids that pad the model's vocabulary: no grammar allows them.
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        # Asked for the usual tokens of bytes that must come: as the text goes on, and never a special token for them.
        return self._tokenizer.encode_within(text)


class Grammar:
    """A compiled grammar; any number of sequences can follow it."""

    def __init__(self, matcher: llguidance.LLMatcher, compiler: GrammarCompiler) -> None:
        self._matcher = matcher
        self._compiler = compiler

    def matcher(self) -> Matcher:
        """State of a sequence at its start (10 us: the lexer's tables are shared)."""
        return Matcher(self._matcher.deep_copy(), self._compiler)


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, compiler: GrammarCompiler) -> None:
        self._matcher = matcher
        self._compiler = compiler
        # End tokens are kept here and not given to llguidance, which does not roll them back.
        self._ended = 0

    @property
    def accepting(self) -> bool:
        """The text so far is whole, so it may end here."""
        return self._ended > 0 or self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Nothing but an end token can follow."""
        return self._ended > 0 or (self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self, out: np.ndarray) -> None:
        """Writes the tokens allowed next: bit i % 32 of word i // 32 stands for token i.

        `out` is uint32 [ceil(vocab_size / 32)]. End tokens are allowed where the grammar accepts, ids that the
        tokenizer lacks nowhere. Where the grammar leaves the text no choice, only its usual token is allowed, and not
        the pieces of it (llguidance's rule; it leaves the text as it is). Raises GrammarError if nothing is allowed.
        """
        assert out.dtype == np.uint32 and out.shape == (-(-self._compiler.vocab_size // 32),), (out.dtype, out.shape)
        assert out.flags.c_contiguous and out.flags.writeable
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self._check()
        if not out.any():
            raise GrammarError(_NOTHING_FOLLOWS)

    def advance(self, token: int) -> None:
        """Takes a token. Raises GrammarError if the grammar does not allow it; the sequence is lost then."""
        if self._compiler.is_end(token):
            if not self.accepting:
                raise GrammarError(f"the grammar does not allow the end token {token} here")
            self._ended += 1
        elif self._ended or not self._matcher.consume_token(token):
            self._check()
            raise GrammarError(f"the grammar does not allow token {token} after an end token")

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens."""
        ends = min(self._ended, tokens)
        self._ended -= ends
        if tokens > ends:
            taken_back = self._matcher.rollback(tokens - ends)
            self._check()
            assert taken_back

    def validate(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, in a row from the first, the grammar allows. The state stays as it is.

        By their bytes: where the grammar leaves no choice, a token may be counted that `mask` leaves out.
        """
        tokens = list(tokens)
        end = next((n for n, token in enumerate(tokens) if self._compiler.is_end(token)), len(tokens))
        allowed = 0 if self._ended or not end else self._matcher.validate_tokens(tokens[:end])
        if allowed < end or end == len(tokens):
            return allowed
        after = self._matcher.deep_copy()
        after.consume_tokens(tokens[:end])
        if not (self._ended or after.is_accepting()):
            return allowed
        ends = itertools.takewhile(self._compiler.is_end, tokens[end:])
        return allowed + len(list(ends))

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
        raise GrammarError(_NOTHING_FOLLOWS if reason == "NoExtensionBias" else reason)
