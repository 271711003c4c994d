"""Export a checkpoint to ONNX. `export.predict` needs no other module and is copied into every export."""
