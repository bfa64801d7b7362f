"""Our transformer beside PyTorch's `transformers` and the patched Flax Llama: speed, and the memory of large shapes."""
