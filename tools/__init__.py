"""Programs around the pack that are not part of it: they make what it ships."""
