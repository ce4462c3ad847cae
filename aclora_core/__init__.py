"""AC-LoRA in plain PyTorch: training, spectra, restarts, files. It knows of no host, so scripts can use it too."""
