"""The commands, by what they do; each parses, calls the library once, and imports what needs torch inside."""
