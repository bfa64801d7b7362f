"""Language models with sites in place, and what is needed to load them. Import the module that you need."""

from typing import Literal

ModelDtype = Literal["float32", "bfloat16"]
"""What a command computes in: the dtype of a model's weights and activations."""
