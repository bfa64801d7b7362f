"""Names of a batch's entries, which only the framework reads."""

Key = str
REQUIRED = "REQUIRED"
