"""Fine-tune aligned language models without losing their refusals: constraints, drift measurements, tables."""

__version__ = "0.2.0"
