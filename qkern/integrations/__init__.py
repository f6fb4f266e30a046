"""What joins qkern to the libraries of Hugging Face; each module is imported on demand only."""
