"""Making quantized models: the arithmetic of the methods, and the walk through a model's layers."""
