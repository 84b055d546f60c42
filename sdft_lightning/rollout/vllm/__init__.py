"""vLLM as the sampler: started by the run itself, or a server that the user runs."""
