"""Prefect flows that compose `ullme` and `indexes`. Loaded at every `import prefect` once the plugin is on: docstring only."""
