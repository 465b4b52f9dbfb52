"""Erasure of a person: what is suppressed, and bronze rows without it. See docs/concepts/erasure.md."""
