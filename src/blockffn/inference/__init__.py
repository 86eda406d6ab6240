"""Decoding: models with a cache, sampling, the plain loop, speculation, and the engine that joins them to text."""
