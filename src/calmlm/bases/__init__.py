"""The frozen base models: loading them, knowing them again, and what differs between model families."""
