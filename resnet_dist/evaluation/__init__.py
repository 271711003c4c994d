"""What a model makes of images: one record per sample first, every metric from those."""
