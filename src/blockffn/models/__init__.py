"""The causal language model and its parts. Single-device code that knows nothing of training."""
