"""Text to batches: `documents` reads text, `prepare` writes tokenised shards, `loader` packs and serves them.

The modules know nothing of models. Import them by name; importing this package loads nothing.
"""
