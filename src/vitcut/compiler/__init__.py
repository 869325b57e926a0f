"""The compiler: from a circuit and a model's weights to a compact model that computes the same."""
