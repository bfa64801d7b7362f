"""From text to activation batches: articles, token rows, streams, shuffling, storage. Import the module that you need."""
