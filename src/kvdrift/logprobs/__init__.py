"""Two dumps of the logprobs of the same tokens, as a sampler and a trainer write them: files in, a verdict out."""
