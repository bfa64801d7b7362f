"""Pursuits beside the products that they cannot do without, and beside scikit-learn."""
