"""Run it elsewhere: the network as a graph, simplified; a sparse engine, ONNX, C."""
