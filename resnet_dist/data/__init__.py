"""Images: where they are, how they are split, decoded, changed and put into batches. Knows nothing of models."""
