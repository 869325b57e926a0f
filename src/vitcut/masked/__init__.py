"""What a circuit means: tracing a model, ablated values, and the masked model."""
