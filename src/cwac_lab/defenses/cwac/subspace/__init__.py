"""The safety subspace: second moments of layer inputs on reference prompts, and their leading eigenvectors."""
