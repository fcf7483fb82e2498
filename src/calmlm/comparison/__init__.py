"""Every system on the same data: methods x experiments x seeds, cells that are never repeated, and the report."""
