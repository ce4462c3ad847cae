"""Programs that make what the pack ships; they are not part of it."""
