"""From the best checkpoint to a deployable file. `export.predict` stands alone and is shipped with every model."""
