"""The measured problems: inputs, the torch compositions that trainers use, and the float64 truth."""
