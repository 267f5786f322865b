"""What is computed: one decoder-only transformer, described by `ModelConfig` fields."""
