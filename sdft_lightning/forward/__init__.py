"""What a model computes: states at completion tokens, packing, prefixes, scoring."""
