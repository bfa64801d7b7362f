"""From text to activation batches: articles, token rows, streams, shuffling, storage. Import what you need."""
