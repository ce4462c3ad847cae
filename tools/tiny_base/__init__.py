"""Make the tiny base model: its images, its training and its evaluation."""
