"""Fine-tune a torchvision ResNet on a folder of images and ship it as ONNX. Importing this costs nothing."""

__version__ = "0.1.0"
