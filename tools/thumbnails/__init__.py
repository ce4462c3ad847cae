"""The pictures of the workflows that the template browser shows."""
