"""How records become people: what each shows, which identifiers join, what is probable, who is connected."""
