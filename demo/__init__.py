"""`make demo`: a real 135M-parameter model, quantized inside torch.compile, timed and scored in one run."""
