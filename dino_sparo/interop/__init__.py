"""Read and write encoders: runs, official DINO files, timm, and ONNX."""
