"""Audio files to batches: decoding, corpora, shards, loading."""
