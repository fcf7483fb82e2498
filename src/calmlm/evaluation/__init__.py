"""Measuring what models do: execution of generated code."""
