"""What a causal language model is: names, loading, adapters, precision, shards, templates."""
