"""An HTTP server for an exported model: `resnet-dist serve`. It needs no torch."""
