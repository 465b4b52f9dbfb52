"""Entity resolution: from source records to people, by shared identifiers and probabilistic matches."""
