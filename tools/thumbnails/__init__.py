"""The images of the workflows that the template browser shows."""
