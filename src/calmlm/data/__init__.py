"""From files of text to token ids and labels: one record, one line number, one clear error."""

from __future__ import annotations

from calmlm.data.formats import Example, read_examples
from calmlm.data.jsonl import Record, read_jsonl
from calmlm.data.labels import Encoded, encode_examples

__all__ = ["Encoded", "Example", "Record", "encode_examples", "read_examples", "read_jsonl"]
