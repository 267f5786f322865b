"""Sources, tokenizer, packing, and a loader whose stream is a function of a global sample index."""

from data.config import DataConfig
from data.corpus import Corpus, SplitStats, gzip_bits_per_byte, prepare
from data.loader import Loader, batch_hash, combine_hashes, row_hashes, step_of_state
from data.rows import Batch, EvaluationBatches, PackedRows, RandomRows, Rows
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "DataConfig",
    "EvaluationBatches",
    "Loader",
    "PackedRows",
    "RandomRows",
    "Rows",
    "SplitStats",
    "Tokenizer",
    "batch_hash",
    "combine_hashes",
    "gzip_bits_per_byte",
    "load_tokenizer",
    "prepare",
    "row_hashes",
    "step_of_state",
    "train_tokenizer",
]
