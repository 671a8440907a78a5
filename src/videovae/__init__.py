"""A trainer for causal video VAEs, on top of rankwise."""
