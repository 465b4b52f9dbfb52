"""Erasure and export of a person's data. See docs/concepts/erasure.md."""
