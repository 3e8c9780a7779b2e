"""The paper's constraints: on weights, on activations, and both at once."""
