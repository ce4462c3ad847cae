"""Step times where the weights do not fit on the GPU."""
