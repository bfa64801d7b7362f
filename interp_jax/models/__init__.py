"""Language models with sites in place, and what is needed to load them. Import the module that you need."""
