"""Sparse autoencoders on the residual stream: activations, training (the only place that imports sae_lens), latents."""
