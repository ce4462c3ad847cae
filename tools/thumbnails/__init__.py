"""Make the thumbnails of the workflows for the template browser."""
