"""From a behaviour to the parts of the model that cause it."""
