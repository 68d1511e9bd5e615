"""Write a network for other programs: ONNX, safetensors, C, VNN-LIB."""
