"""Attribution beside forward and backward passes, and patching beside PyTorch."""
