"""How published models describe themselves: settings as a ModelConfig, tensors as our parameters. Data only."""
