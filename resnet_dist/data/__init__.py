"""Images: find, split, check, decode, augment and batch them. Independent of `model`."""
