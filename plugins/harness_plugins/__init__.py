"""The built-in plugins, registered exactly as third parties' are: through the entry points in pyproject.toml."""
